"""Who started this process and which rank it is; the only module that reads or writes launcher variables.

Order: torchrun's variables win (`deepspeed` sets the same), then an MPI launcher, then a Slurm step, else one
rank alone.
"""

import functools
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from grads_dist.errors import ConfigError

Launcher = Literal["single", "torchrun", "deepspeed", "slurm", "mpi"]
DEFAULT_PORT = 29500
NAME_TRIES = 5
"""Times that a name is looked up, a second apart: a name server that many ranks ask at once may drop some."""

LONGEST_NUMBER = 18
"""Digits of a variable: more fit into no 64-bit number."""


@dataclass(frozen=True)
class Placement:
    """The place of one process among all ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Launcher = "single"
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT


@functools.cache
def detect() -> Placement:
    """Find the placement of this process, once.

    Under an MPI launcher the first call is a collective: every rank must make it.
    Raises ConfigError when the launcher's variables are incomplete or no numbers, or name a host that this
    node does not know.
    """
    placement = place(os.environ)
    if placement.world_size > 1:
        _check_host(placement.master_addr)
    return placement


def place(env: Mapping[str, str]) -> Placement:
    """Read the placement from the variables `env`; imports mpi4py only if an MPI launcher set them.

    Raises ConfigError for variables that are no numbers, or contradict each other.
    """
    placement = _read(env)
    if not placement.rank < placement.world_size:
        raise ConfigError(
            f"rank: {placement.rank} of {placement.world_size} ranks, by {placement.launcher}'s variables; "
            "allowed: a rank below their number"
        )
    if placement.world_size > 1 and not 0 < placement.master_port < 2**16:
        raise ConfigError(f"MASTER_PORT: {placement.master_port} is not allowed; allowed: 1 to {2**16 - 1}")
    return placement


def _read(env: Mapping[str, str]) -> Placement:
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torch(env)
    if _started_by_mpi(env):
        return _from_mpi(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _from_slurm(env)
    # Nobody else has to know the port, and what starts a group by it must not meet another process alone.
    return Placement(master_port=_free_port())


def export(placement: Placement) -> None:
    """Set the variables that torch.distributed and DeepSpeed read, whoever the launcher was."""
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.world_size),
        LOCAL_RANK=str(placement.local_rank),
        LOCAL_WORLD_SIZE=str(placement.local_world_size),
        MASTER_ADDR=placement.master_addr,
        MASTER_PORT=str(placement.master_port),
    )


def choose_cpu_for_deepspeed() -> None:
    """Keep DeepSpeed from probing for accelerators; effective only before deepspeed is first imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def job() -> str | None:
    """The batch job that this process is part of, as `slurm job 77`, or None."""
    for name, system in (("SLURM_JOB_ID", "slurm"), ("PBS_JOBID", "pbs"), ("LSB_JOBID", "lsf")):
        if os.environ.get(name):
            return f"{system} job {os.environ[name]}"
    return None


def is_restarted() -> bool:
    """Whether this process is part of a batch job that has been queued again, under the same number."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def agent_holds_store() -> bool:
    """Whether the store of the rendezvous lives in torchrun's agent, and not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def quieten_torch() -> None:
    """Keep torch from writing a page for every broken connection; before it is first imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def finish(placement: Placement) -> None:
    """Tell the launcher that this rank ends well; without it `mpiexec` stops the other ranks."""
    if placement.launcher == "mpi":
        from mpi4py import MPI

        if not MPI.Is_finalized():
            MPI.Finalize()


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `n[03-05,9],m1` gives `n03`."""
    # The first element ends at the first comma outside brackets; it may hold several brackets.
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodelist)
    if match is None:
        raise ConfigError(
            f"SLURM_NODELIST: {nodelist!r} is not a node list; allowed: names such as n[1-3],m1"
        )
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", match.group())


def _from_torch(env: Mapping[str, str]) -> Placement:
    world_size = _number(env, "WORLD_SIZE")
    if world_size > 1 and ("MASTER_ADDR" not in env or "MASTER_PORT" not in env):
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT: unset while WORLD_SIZE is {world_size}; start with torchrun"
        )
    # `deepspeed` calls it LOCAL_SIZE.
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
    return Placement(
        rank=_number(env, "RANK"),
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_world_size=_number(env, local_size) if local_size else world_size,
        launcher="deepspeed" if "CROSS_RANK" in env else "torchrun",
        master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", DEFAULT_PORT),
    )


def _from_slurm(env: Mapping[str, str]) -> Placement:
    # The step's number of tasks is what srun started; SLURM_NTASKS may be the whole allocation's.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    # A step on one node needs no name, which compute nodes may not know.
    head = "127.0.0.1" if env.get("SLURM_STEP_NUM_NODES") == "1" else first_host(nodes)
    # The ranks cannot talk yet, so the port follows from what all of them know; two jobs on a node differ.
    shared = _number(env, "SLURM_JOB_ID", 0) * 7 + _number(env, "SLURM_STEP_ID", 0)
    return Placement(
        rank=_number(env, "SLURM_PROCID"),
        world_size=_number(env, tasks, 1),
        local_rank=_number(env, "SLURM_LOCALID", 0),
        local_world_size=_tasks_on_node(per_node, _number(env, "SLURM_NODEID", 0)),
        launcher="slurm",
        master_addr=env.get("MASTER_ADDR") or head,
        master_port=_number(env, "MASTER_PORT", 20000 + shared % 10000),
    )


def _tasks_on_node(per_node: str, node: int) -> int:
    """Expand Slurm's `2(x3),1`: tasks on each node, in order."""
    for count, times in re.findall(r"(\d{1,9})(?:\(x(\d{1,9})\))?", per_node):
        if node < int(times or 1):
            return int(count)
        node -= int(times or 1)
    return 1


def _started_by_mpi(env: Mapping[str, str]) -> bool:
    # mpirun inside a Slurm job starts its helpers with srun, so Slurm's variables are there too and mean the
    # helpers; srun itself may set PMI_RANK, but neither of the first two.
    if "OMPI_COMM_WORLD_RANK" in env or "MPI_LOCALRANKID" in env:
        return True
    return "PMI_RANK" in env and "PMI_SIZE" in env and "SLURM_STEP_ID" not in env


def _from_mpi(env: Mapping[str, str]) -> Placement:
    MPI = _import_mpi()
    world = MPI.COMM_WORLD
    _check_mpi_size(env, world.Get_size())
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = local.Get_size() == world.Get_size()
    host = env.get("MASTER_ADDR") or ("127.0.0.1" if one_node else socket.gethostname())
    port = _number(env, "MASTER_PORT", 0) or _free_port()
    host, port = world.bcast((host, port), root=0)
    return Placement(
        rank=world.Get_rank(),
        world_size=world.Get_size(),
        local_rank=local.Get_rank(),
        local_world_size=local.Get_size(),
        launcher="mpi",
        master_addr=host,
        master_port=port,
    )


def _import_mpi() -> ModuleType:
    try:
        import mpi4py

        # Leaving without MPI_Finalize is how a failed rank makes mpiexec stop the others: see finish().
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        # RuntimeError: mpi4py is there and finds no MPI library.
        raise ConfigError(
            f"mpi4py: cannot be used ({error}), but mpiexec started this rank; "
            "allowed: mpi4py with the MPI library of that mpiexec, or torchrun"
        ) from None
    module: ModuleType = MPI
    return module


def _check_mpi_size(env: Mapping[str, str], size: int) -> None:
    """Raise ConfigError where mpi4py found another MPI library than mpiexec's: each rank would be alone."""
    name = next((n for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if n in env), None)
    if name is not None and _number(env, name) != size:
        raise ConfigError(
            f"{name}: {env[name]}, but mpi4py sees {size} rank; allowed: an mpiexec of mpi4py's MPI library"
        )


def _check_host(name: str) -> None:
    """Raise ConfigError for a host that cannot be looked up; torch would try for half an hour."""
    for attempt in range(NAME_TRIES):
        try:
            socket.getaddrinfo(name, None)
            return
        except socket.gaierror:
            if attempt < NAME_TRIES - 1:
                time.sleep(1)
    raise ConfigError(
        f"MASTER_ADDR: this node does not know the host {name!r}; "
        "allowed: a name or an address of rank 0's node that all nodes know, set in the environment"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or len(text) > LONGEST_NUMBER:
        raise ConfigError(
            f"{name}: {text!r} in the environment; allowed: a whole number, as launchers set it"
        )
    return int(text)
