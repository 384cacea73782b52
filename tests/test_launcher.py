"""Which rank a process is, read from what each launcher sets."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import clean_environment

from grads_dist.errors import ConfigError
from grads_dist.runtime import launcher
from grads_dist.runtime.launcher import Placement, first_host, place

SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "99",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_NODELIST": "gpu[01-09]",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}


def test_alone_is_one_rank():
    found = place({})
    assert found == Placement(0, 1, 0, 1, "single", master_port=found.master_port)
    assert len({place({}).master_port for _ in range(5)}) > 1


def test_torchrun_wins_over_slurm():
    assert place(SLURM | TORCHRUN) == Placement(3, 4, 1, 2, "torchrun", "head", 1234)


def test_deepspeed_launcher_is_known():
    env = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}
    placement = place(env | {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"})
    assert placement == Placement(3, 4, 1, 2, "deepspeed", "head", 1234)


def test_slurm_step():
    placement = place(SLURM)
    assert placement == Placement(5, 6, 1, 2, "slurm", "gpu07", placement.master_port)
    assert 20000 <= placement.master_port < 30000
    # All ranks of the step must come to the same port, and another job on the node to another.
    assert place(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port == placement.master_port
    assert place(SLURM | {"SLURM_JOB_ID": "13"}).master_port != placement.master_port


def test_slurm_step_on_one_node_needs_no_name():
    env = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu07"}
    assert place(env).master_addr == "127.0.0.1"
    assert place(env | {"MASTER_ADDR": "10.0.0.7"}).master_addr == "10.0.0.7"


def test_slurm_batch_script_without_srun_is_one_rank():
    env = {k: v for k, v in SLURM.items() if "STEP" not in k}
    assert place(env).world_size == 1


def test_slurm_uneven_nodes():
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"}
    assert place(env).local_world_size == 1


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n[1-3]", "n1"),
        ("n[03,05-9],m1", "n03"),
        ("n1", "n1"),
        ("a-b.c,d", "a-b.c"),
        ("rack[2-4]-gpu,x", "rack2-gpu"),
        ("rack[1-2]node[1-4]", "rack1node1"),
        ("r[07,9]n[03-4]-x,m[1-2]", "r07n03-x"),
    ],
)
def test_first_host(nodelist, first):
    assert first_host(nodelist) == first


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK: 'x'"),
        (TORCHRUN | {"MASTER_PORT": "-1"}, "MASTER_PORT: '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_NODELIST: ''"),
    ],
)
def test_broken_launcher_variables_are_named(env, named):
    with pytest.raises(ConfigError, match=named):
        place(env)


def test_host_that_no_node_knows_is_named_at_once(monkeypatch):
    asked = []

    def unknown(host, port):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(launcher.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launcher.os, "environ", SLURM)
    with pytest.raises(ConfigError, match="MASTER_ADDR: this node does not know the host 'gpu07'; allowed"):
        launcher.detect.__wrapped__()
    assert asked == ["gpu07"] * launcher.NAME_TRIES


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        # Started by the mpiexec of another MPI than mpi4py's, every rank is alone in its world.
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE: 2, but mpi4py sees 1 rank; allowed"),
        ({"MPI4PY_LIBMPI": "/nowhere.so"}, "mpi4py: cannot be used (cannot load MPI library"),
    ],
)
def test_mpi_that_does_not_fit_is_refused_in_one_line(variables, line):
    command = [sys.executable, "-m", "grads_dist", "run"]
    env = clean_environment(OMPI_COMM_WORLD_RANK="1", **variables)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"grads-dist: error: {line}")


def test_mpi_without_mpi4py_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"mpi4py: cannot be used \(.*or torchrun"):
        place({"PMI_RANK": "0", "PMI_SIZE": "2"})


def test_only_the_launcher_module_reads_launcher_variables():
    names = r"(LOCAL_)?(RANK|WORLD_SIZE|SIZE)|MASTER_(ADDR|PORT)|(SLURM|OMPI|PMI|PMIX|MPI|CROSS)_[A-Z_]+"
    package = Path(launcher.__file__).parent.parent
    sources = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    readers = [name for name, path in sources.items() if re.search(rf"[\"']({names})[\"']", path.read_text())]
    assert readers == ["runtime/launcher.py"]
