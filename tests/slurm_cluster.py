"""A real Slurm cluster of two nodes on this machine, in a temporary folder, apart from any other."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launching import LAUNCH, TIMEOUT, end, free_port, launch_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("n1", "n2")
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
FirstJobId={first_job}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Two idle nodes, n1 and n2, of two CPUs each; no name server knows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = launch_environment(SLURM_CONF=str(folder / "slurm.conf"))

    def submit(
        self, options: Sequence[str], args: Sequence[str], folder: Path, **variables: str
    ) -> tuple[str, Path]:
        """Submit the shipped batch script as a job of both nodes; returns the job's number and its log."""
        command = ["sbatch", "--parsable", "--nodes", "2", *options, str(LAUNCH / "slurm.sbatch"), *args]
        job = self.call(*command, folder=folder, **variables).strip()
        return job, folder / f"slurm-{job}.log"

    def call(self, *command: str, folder: Path | None = None, **variables: str) -> str:
        """Run one of Slurm's commands; returns what it wrote."""
        done = subprocess.run(
            command, cwd=folder, env=self.env | variables, text=True, capture_output=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_again(self, job: str) -> None:
        """Start a job soon that was queued again; by itself Slurm waits two minutes."""
        # Not at once: a node refuses credentials as old, by the second, as its latest order to end the job.
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def wait_for_end(self, job: str) -> int:
        """Wait until the job is over; returns its exit code."""
        self.wait_until(lambda: self.job(job)["JobState"] not in UNDER_WAY)
        return int(self.job(job)["ExitCode"].partition(":")[0])

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Look again and again; when time is up, fails with what the daemons wrote."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(self.logs())
            time.sleep(0.1)

    def logs(self) -> str:
        """What the daemons wrote."""
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("*.out")))


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start munge, the controller and two nodes; all of it ends with the block, or with this process."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name,
        ExitStack() as stack,
    ):
        folder = Path(name)
        # munge wants its socket within reach of every user.
        folder.chmod(0o711)
        _configure(folder)
        cluster = SlurmCluster(folder)
        _start(stack, cluster, "munge", _munged(folder))
        cluster.wait_until(lambda: (folder / "munge.sock").exists())
        _start(stack, cluster, "slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            _start(stack, cluster, node, ["slurmd", "-D", "-N", node])
        stack.callback(_cancel_all, cluster)
        cluster.wait_until(lambda: _states(cluster) == ["idle", "idle"])
        yield cluster


def _configure(folder: Path) -> None:
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    text = CONFIGURATION.format(
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        folder=folder,
        ports=[free_port() for _ in range(3)],
        # The ranks' port follows from the job's number, and another cluster may be on this machine.
        first_job=os.getpid(),
    )
    (folder / "slurm.conf").write_text(text, encoding="utf-8")


def _munged(folder: Path) -> list[str]:
    files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "seed"}
    return ["munged", "--foreground", *[f"--{option}={folder / file}" for option, file in files.items()]]


def _start(stack: ExitStack, cluster: SlurmCluster, name: str, command: list[str]) -> None:
    log = stack.enter_context((cluster.folder / f"{name}.out").open("w"))
    # The kernel kills it if this process dies without a chance to.
    command = ["setpriv", "--pdeathsig", "KILL", *command]
    process = subprocess.Popen(
        command, env=cluster.env, text=True, stdout=log, stderr=log, start_new_session=True
    )
    stack.callback(end, process, signal.SIGTERM)


def _states(cluster: SlurmCluster) -> list[str]:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format", "%T"], env=cluster.env, text=True, capture_output=True
    )
    return done.stdout.split()


def _cancel_all(cluster: SlurmCluster) -> None:
    """End the jobs while there are daemons to do it."""
    subprocess.run(["scancel", "--user", getpass.getuser()], env=cluster.env, timeout=30, check=False)
    cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"))
