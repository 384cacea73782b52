"""Every launcher, started for real by its script on two CPU ranks, gives the score table of one rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import slurm_cluster
import ssh_hosts
from launching import LAUNCH, Finished, free_port, launch_environment, require_programs, run_all, run_script
from score_tables import faults_between, numels, read_features, read_scores
from slurm_cluster import UNDER_WAY, SlurmCluster
from workspace import (
    launch,
    make_model,
    make_rows,
    probe_alone,
    run_arguments,
    run_program,
    write_jsonl,
    write_stage,
)

WORKER = Path(__file__).with_name("probe_worker.py")
NUM_ROWS = 24
LONG_ROWS = 600
"""Of a run that can be stopped in its middle: some seconds."""
BOUND = 32 * float(np.finfo(np.float32).eps)
"""3.8e-6, as in test_invariance.py. All launchers make the same batches, so with one thread a rank nothing
differs at all; another number of threads adds up in another order (observed: 6e-7)."""
TRAINED_BOUND = 1e-5
"""Three steps of Adam on gradients that differ by rounding between the stages of ZeRO (observed: 7e-7)."""
OFFLOADED = {"device": "cpu", "pin_memory": True}
SHIPPED = [("zero1", 1, None), ("zero2", 2, None), ("zero3", 3, None), ("zero3_offload", 3, OFFLOADED)]
DISK = os.environ.get("GRADS_DIST_TEST_NVME")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, and `single`, the run of one rank alone."""
    folder = tmp_path_factory.mktemp("launchers")
    return probe_alone(folder, NUM_ROWS, probe_arguments(folder, "single"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    require_programs(slurm_cluster.PROGRAMS, slurm_cluster.PACKAGES)
    with slurm_cluster.slurm_cluster() as started:
        yield started


def probe_arguments(folder: Path, output: str) -> list[str]:
    options = {"probe__mode": "frozen", "probe__shard_rows": 8}
    return ["probe", *run_arguments(folder, output, **options)]


def check(folder: Path, output: str, launcher: str, done: Finished) -> None:
    """The run ended well, was of two ranks, and its table is that of one."""
    assert done.code == 0, done.output
    run, single = folder / output, folder / "single"
    about = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert (about["launcher"], about["world_size"], about["device"]) == (launcher, 2, "cpu")
    assert sorted(path.name for path in (run / "logs").glob("*.log")) == ["rank-00000.log", "rank-00001.log"]
    found, truth = read_scores(run), read_scores(single)
    assert found["index"].to_pylist() == truth["index"].to_pylist() and truth.num_rows == NUM_ROWS
    faults = faults_between(found, truth, numels(single), BOUND)
    assert not faults, "\n".join(faults)
    np.testing.assert_allclose(read_features(run), read_features(single), rtol=2.0**-10, atol=1e-6)


def test_torchrun_on_one_node(folder):
    env = launch_environment(NPROC="2")
    done = run_script("torchrun.sh", probe_arguments(folder, "torchrun"), folder, env)
    check(folder, "torchrun", "torchrun", done)


def test_two_torchrun_agents_meet_by_rendezvous(folder):
    env = launch_environment(NPROC="1", NNODES="2", HEAD=f"127.0.0.1:{free_port()}", JOB="test")
    command = [str(LAUNCH / "torchrun.sh"), *probe_arguments(folder, "agents")]
    first, second = run_all([command, command], folder, env)
    assert second.code == 0, second.output
    check(folder, "agents", "torchrun", first)


def test_deepspeed_on_one_node(folder):
    env = launch_environment(NPROC="2")
    args = ["--master_port", str(free_port()), "--", *probe_arguments(folder, "deepspeed")]
    done = run_script("deepspeed.sh", args, folder, env)
    assert "'grads_dist', '--local_rank=1', 'probe'" in done.output, done.output
    check(folder, "deepspeed", "deepspeed", done)


def test_deepspeed_with_a_hostfile_over_ssh(folder, tmp_path):
    require_programs(ssh_hosts.PROGRAMS, ssh_hosts.PACKAGES)
    hosts = (LAUNCH / "hostfile.example").read_text(encoding="utf-8").replace("slots=8", "slots=1")
    hosts = hosts.replace("node0", "127.0.0.1").replace("node1", "127.0.0.2")
    (tmp_path / "hostfile").write_text(hosts, encoding="utf-8")
    # What deepspeed hands on to the hosts; ssh hands on nothing.
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n", encoding="utf-8")
    args = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    with ssh_hosts.ssh_hosts(tmp_path) as env:
        args += ["--", *probe_arguments(folder, "hostfile")]
        done = run_script("deepspeed.sh", args, tmp_path, env | {"HOSTFILE": "hostfile"})
    assert "127.0.0.2: " in done.output, done.output
    check(folder, "hostfile", "deepspeed", done)


def test_mpiexec(folder):
    # As two nodes: without shared memory between the ranks each is the first of its own.
    args = ["-genv", "MPIR_CVAR_NOLOCAL", "1", "--", *probe_arguments(folder, "mpi")]
    done = run_script("mpirun.sh", args, folder, launch_environment(NPROC="2"))
    check(folder, "mpi", "mpi", done)


def finish(cluster: SlurmCluster, job: str, log: Path) -> Finished:
    code = cluster.wait_for_end(job)
    return Finished(code, log.read_text(encoding="utf-8"))


def test_srun_with_one_task_a_rank(folder, cluster):
    args = probe_arguments(folder, "slurm")
    job, log = cluster.submit(["--ntasks-per-node", "1"], args, folder, MASTER_ADDR="127.0.0.1")
    check(folder, "slurm", "slurm", finish(cluster, job, log))


def test_srun_with_torchrun_in_each_node(folder, cluster):
    args = probe_arguments(folder, "slurm-torchrun")
    variables = {"NPROC": "1", "MASTER_ADDR": "127.0.0.1"}
    job, log = cluster.submit(["--ntasks-per-node", "1"], args, folder, **variables)
    check(folder, "slurm-torchrun", "torchrun", finish(cluster, job, log))


STAND_IN = """
import os, signal, sys, time

rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]


def stop(number, frame):
    time.sleep(0.5)
    print("rank", rank, "got", number, "and is done", flush=True)
    # The first to leave ends the others.
    time.sleep(0.5)
    sys.exit(4)


signal.signal(signal.SIGUSR1, stop)
print("rank", rank, "start", os.environ.get("SLURM_RESTART_COUNT", "0"), sys.argv[1:], flush=True)
if sys.argv[1] == "fail" and rank == "1":
    sys.exit(3)
if sys.argv[1] == "outcome" and rank == "1":
    with open(os.environ["GRADS_DIST_OUTCOME"], "w") as file:
        file.write("4")
    os.kill(os.getpid(), signal.SIGKILL)
if "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(100)
"""
"""In place of the program: ends with 4 on SIGUSR1, and well when it is started again."""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Variables under which `python -m grads_dist` is the stand-in."""
    package = tmp_path / "stand_in" / "grads_dist"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(STAND_IN, encoding="utf-8")
    return {"PYTHONPATH": str(package.parent), "MASTER_ADDR": "127.0.0.1"}


def interrupt(cluster: SlurmCluster, job: str, log: Path) -> None:
    """Signal the batch script, as Slurm does before the time limit, once both ranks are at work."""
    cluster.wait_until(lambda: log.exists() and log.read_text().count("start 0") == 2)
    cluster.call("scancel", "--batch", "--signal=USR1", job)


def stops(log: Path) -> list[str]:
    return sorted(line for line in log.read_text(encoding="utf-8").splitlines() if " got " in line)


BOTH = [f"rank {rank} got {int(signal.SIGUSR1)} and is done" for rank in (0, 1)]
"""Once each, because a second signal means to leave at once; and with the time to do so."""


def test_time_limit_stops_the_ranks_and_queues_the_job_again(cluster, stand_in, tmp_path):
    options = ["--ntasks-per-node", "1", "--cpus-per-task", "2"]
    job, log = cluster.submit(options, ["wait", "--overwrite", "--x", "a b"], tmp_path, **stand_in)
    cluster.wait_until(lambda: log.exists() and "start 0" in log.read_text())
    assert " CPUs=4 " in cluster.call("scontrol", "show", "step", f"{job}.0")
    interrupt(cluster, job, log)
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1")
    assert stops(log) == BOTH
    cluster.start_again(job)
    assert cluster.wait_for_end(job) == 0
    text = log.read_text(encoding="utf-8")
    assert text.count("start 0 ['wait', '--overwrite', '--x', 'a b']") == 2
    assert text.count("start 1 ['wait', '--overwrite', '--x', 'a b']") == 2
    assert not list(tmp_path.glob(".grads_dist-*"))


def test_a_job_that_is_stopped_in_the_middle_goes_on_when_it_is_queued_again(cluster, tmp_path):
    make_model(tmp_path / "model")
    write_jsonl(tmp_path / "corpus.jsonl", make_rows(LONG_ROWS))
    # One row a micro-batch, so that there is a middle.
    options = {"probe__mode": "frozen", "probe__batch_tokens": 1}
    single = run_program("probe", *run_arguments(tmp_path, "single", **options))
    assert single.returncode == 0, single.stderr
    args = ["probe", *run_arguments(tmp_path, "slurm", **options)]
    job, log = cluster.submit(["--ntasks-per-node", "1"], args, tmp_path, MASTER_ADDR="127.0.0.1")
    scores = tmp_path / "slurm" / "scores"
    cluster.wait_until(lambda: any(scores.glob("shard-*")))
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1")
    assert "grads-dist: error: interrupted by SIGUSR1; start the same command again" in log.read_text()
    before = {path: path.stat().st_mtime_ns for path in scores.glob("shard-*")}
    assert before and not (tmp_path / "slurm" / "manifest.json").exists()
    cluster.start_again(job)
    assert cluster.wait_for_end(job) == 0, f"{log.read_text()}\n{cluster.logs()}"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found, truth = (read_scores(tmp_path / name) for name in ("slurm", "single"))
    assert found["index"].to_pylist() == truth["index"].to_pylist()
    faults = faults_between(found, truth, numels(tmp_path / "single"), BOUND)
    assert not faults, "\n".join(faults)


def test_time_limit_reaches_the_ranks_under_torchrun(cluster, stand_in, tmp_path):
    job, log = cluster.submit(["--ntasks-per-node", "1"], ["wait"], tmp_path, NPROC="1", **stand_in)
    interrupt(cluster, job, log)
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1")
    assert stops(log) == BOTH
    # The agents lived to see it.
    assert "exitcode  : 4" in log.read_text(encoding="utf-8")
    cluster.call("scancel", job)


def test_a_job_whose_program_leaves_4_is_queued_again_whatever_srun_says(cluster, stand_in, tmp_path):
    """Out of memory: the first rank to leave has the other killed, and srun tells of the kill."""
    job, _ = cluster.submit(["--ntasks-per-node", "1"], ["outcome"], tmp_path, **stand_in)
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1")
    assert cluster.job(job)["JobState"] in UNDER_WAY
    cluster.call("scancel", job)


def test_a_rank_that_fails_ends_the_job(cluster, stand_in, tmp_path):
    job, _ = cluster.submit(["--ntasks-per-node", "1"], ["fail"], tmp_path, **stand_in)
    cluster.wait_for_end(job)
    assert cluster.job(job)["JobState"] == "FAILED"
    assert cluster.job(job)["Restarts"] == "0"


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run in train mode with each shipped DeepSpeed file, and one without ZeRO, all in one launch."""
    train(
        folder, {"plain": write_stage(folder, 0)} | {name: LAUNCH / f"{name}.json" for name, _, _ in SHIPPED}
    )
    return folder


def train(folder: Path, files: dict[str, Path]) -> None:
    """Train and probe with each of these DeepSpeed files, two ranks, all in one launch."""
    jobs = []
    for name, path in files.items():
        options = {"probe__mode": "train", "probe__learning_rate": 0.01, "deepspeed": path}
        jobs.append({"arguments": run_arguments(folder, name, **options)})
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    launch(2, WORKER, str(folder / "jobs.json"))


@pytest.mark.parametrize(("name", "stage", "offload"), SHIPPED)
def test_shipped_deepspeed_file(trained, name, stage, offload):
    manifest = json.loads((trained / name / "manifest.json").read_text(encoding="utf-8"))
    zero = manifest["deepspeed"]["zero_optimization"]
    assert (manifest["zero_stage"], zero["stage"]) == (stage, stage)
    assert zero.get("offload_optimizer") == zero.get("offload_param") == offload
    found, truth = read_scores(trained / name), read_scores(trained / "plain")
    faults = faults_between(found, truth, numels(trained / "plain"), TRAINED_BOUND)
    assert not faults, "\n".join(faults)


def test_the_weights_moved_while_the_deepspeed_files_were_tried(trained):
    """Else a file under which nothing is trained would pass."""
    before, after = (read_scores(trained / name) for name in ("single", "plain"))
    first = after["step"].to_numpy() == 0
    change = np.abs(after["loss"].to_numpy() / before["loss"].to_numpy() - 1)
    assert change[first].max() < BOUND
    assert change[~first].max() > 0.05


@pytest.mark.skipif(DISK is None, reason="GRADS_DIST_TEST_NVME names no folder to offload to")
def test_nvme_offload_to_a_disk(tmp_path):
    # Weights of less than 1 MiB a rank are not written.
    make_model(tmp_path / "model", hidden_size=1024, num_hidden_layers=1, intermediate_size=1024)
    write_jsonl(tmp_path / "corpus.jsonl", make_rows(NUM_ROWS))
    content = json.loads((LAUNCH / "zero3_nvme.json").read_text(encoding="utf-8"))
    zero = content["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == zero["offload_param"]["nvme_path"] == "/local_nvme"
    swap = Path(tempfile.mkdtemp(prefix="swap-", dir=DISK))
    for section in ("offload_optimizer", "offload_param"):
        zero[section]["nvme_path"] = str(swap)
    zero["offload_param"]["buffer_size"] = 2_000_000
    (tmp_path / "nvme.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        train(tmp_path, {"host": LAUNCH / "zero3_offload.json", "disk": tmp_path / "nvme.json"})
        # DeepSpeed leaves its files there.
        assert sum(path.stat().st_size for path in swap.rglob("*.swp")) > 2**20
    finally:
        shutil.rmtree(swap)
    found, truth = read_scores(tmp_path / "disk"), read_scores(tmp_path / "host")
    faults = faults_between(found, truth, numels(tmp_path / "host"), BOUND)
    assert not faults, "\n".join(faults)
