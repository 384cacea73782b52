"""Two hosts and a router between them, as network namespaces of this machine; traffic stays inside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FAULTS = ("link down", "silence")
"""How the hosts are cut off: the link goes down, which they can see; or the router drops every packet."""

_KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=2)
except ConnectionRefusedError:
    pass
"""
"""Fails unless the host of that address answers, be it that nobody listens there."""


@dataclass(frozen=True)
class Network:
    """Names of the namespaces of two hosts and their router."""

    hosts: tuple[str, str]
    router: str

    @property
    def addresses(self) -> tuple[str, str]:
        """The addresses of the hosts."""
        return ("10.77.1.2", "10.77.2.2")

    def prefix(self, host: int) -> list[str]:
        """What runs a command as the only rank of one of the hosts."""
        own = [f"GLOO_SOCKET_IFNAME=eth{host}", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1"]
        return ["ip", "netns", "exec", self.hosts[host], "env", *own]

    def cut(self, fault: str) -> None:
        """Cut the hosts off from each other."""
        if fault == "silence":
            _forward(self.router, on=False)
        else:
            _ip("-n", self.router, "link", "set", "port1", "down")

    def restore(self) -> None:
        """Undo any `cut`."""
        _forward(self.router, on=True)
        _ip("-n", self.router, "link", "set", "port1", "up")

    def joined(self) -> bool:
        """Whether a packet gets from the one host to the other and back."""
        command = [*self.prefix(0), sys.executable, "-c", _KNOCK, self.addresses[1]]
        return subprocess.run(command, capture_output=True).returncode == 0


def why_not() -> str | None:
    """Why there can be no such network here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "sysctl") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}: install iproute2 and procps"
    found = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return None if found.returncode == 0 else f"no network namespaces: {found.stderr.strip()}"


@contextmanager
def make_network() -> Iterator[Network]:
    """Make the namespaces and remove them at the end."""
    names = [f"grads-{os.getpid()}-{end}" for end in ("a", "b", "router")]
    network = Network((names[0], names[1]), names[2])
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for host, name in enumerate(network.hosts):
            _join(network, host, name)
        _forward(network.router, on=True)
        yield network
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _join(network: Network, host: int, name: str) -> None:
    """Join a host to its port of the router."""
    subnet, port, device = f"10.77.{host + 1}", f"port{host}", f"eth{host}"
    _ip("-n", network.router, "link", "add", port, "type", "veth", "peer", "name", device, "netns", name)
    _ip("-n", network.router, "address", "add", f"{subnet}.1/24", "dev", port)
    _ip("-n", network.router, "link", "set", port, "up")
    _ip("-n", name, "address", "add", f"{subnet}.2/24", "dev", device)
    _ip("-n", name, "link", "set", device, "up")
    _ip("-n", name, "route", "add", "default", "via", f"{subnet}.1")


def _forward(router: str, on: bool) -> None:
    subprocess.run(
        ["ip", "netns", "exec", router, "sysctl", "-qw", f"net.ipv4.ip_forward={int(on)}"], check=True
    )


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)
