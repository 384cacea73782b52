"""Two hosts to reach by ssh, both this machine: a real sshd on two loopback addresses, with its own keys."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launching import end, free_port, launch_environment

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh", "setpriv")
PACKAGES = ("openssh-server", "openssh-client", "pdsh")
HOSTS = ("127.0.0.1", "127.0.0.2")

SERVER = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
CLIENT = """\
Host *
    Port {port}
    IdentityFile {folder}/user
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known_hosts
    LogLevel ERROR
"""


@contextmanager
def ssh_hosts(folder: Path) -> Iterator[dict[str, str]]:
    """Start sshd; gives the environment in which `ssh HOST` reaches it, without a file in the home folder."""
    env = launch_environment()
    path = env["PATH"]
    port = free_port()
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True, timeout=30)
    for name, text in {"sshd_config": SERVER, "ssh_config": CLIENT}.items():
        (folder / name).write_text(text.format(port=port, folder=folder), encoding="utf-8")
    programs = folder / "bin"
    programs.mkdir()
    # ssh looks for its settings in the account's home folder, wherever HOME points.
    wrapper = programs / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=path)} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    if os.geteuid() == 0:
        # sshd wants it when it runs as root.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    sshd = [str(shutil.which("sshd", path=path)), "-D", "-f", str(folder / "sshd_config")]
    command = ["setpriv", "--pdeathsig", "KILL", *sshd, "-E", str(folder / "sshd.log")]
    server = subprocess.Popen(command, env=env, text=True, start_new_session=True)
    try:
        _wait_for_port(port, folder / "sshd.log")
        yield env | {"PATH": f"{programs}{os.pathsep}{path}"}
    finally:
        end(server, signal.SIGTERM)


def _wait_for_port(port: int, log: Path) -> None:
    deadline = time.monotonic() + 30
    for host in HOSTS:
        while True:
            try:
                socket.create_connection((host, port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, log.read_text() if log.exists() else "no sshd"
                time.sleep(0.1)
