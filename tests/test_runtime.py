"""Ranks, the run directory and logs. As a script, this file is what the ranks of its tests do."""

import datetime
import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import clean_environment

from grads_dist.errors import ConfigError, DataError, GradsDistError
from grads_dist.runtime import launcher, logs
from grads_dist.runtime.faults import explain_os_error
from grads_dist.runtime.rundir import RunDir, atomic_write


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "device"), [(3, 0, "cpu"), (3, 4, "cuda:3"), (1, 1, "cuda:0")]
)
def test_pick_device(local_rank, num_gpus, device):
    from grads_dist.runtime.ranks import pick_device

    assert pick_device(local_rank, num_gpus) == device


def test_pick_device_refuses_more_ranks_than_gpus():
    from grads_dist.runtime.ranks import pick_device

    with pytest.raises(ConfigError, match="local rank 2 has no GPU; allowed: at most 2"):
        pick_device(2, 2)


def test_ranks_that_share_a_gpu_are_named():
    from grads_dist.runtime.ranks import Gpu, shared_gpu

    own = [Gpu(f"n{node}", f"boot{node}", f"gpu{node}{i}") for node in (0, 1) for i in (0, 1)]
    assert shared_gpu([None, None]) is None
    assert shared_gpu([*own, None, None]) is None
    # Two hosts of one name, and a number that is unique on its host alone.
    assert shared_gpu([own[0], own[0]._replace(boot="another")]) is None
    assert shared_gpu([*own[:3], None, own[2], own[0]]) == (
        "ranks per node: ranks 2 and 4 (host n1) have the same GPU (gpu10); allowed: one rank a GPU, and "
        "each rank shown its own if it is shown one"
    )


def test_two_ranks_under_torchrun(torchrun, tmp_path):
    done = torchrun(2, Path(__file__), "cases", str(tmp_path))
    assert done.returncode == 0, done.stderr
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, own in enumerate(seen):
        assert own["place"] == [rank, 2, rank, "torchrun", rank == 0]
        assert own["on_main"] == {"by": 0, "slow": True}
        assert own["main_error"] == ["DataError", "bad rows"]
        assert own["agreed"] == ["ConfigError", "only rank 1"]
        assert own["lowest"] == ["DataError", "rank 0"]
        assert own["no_error"] is True
        assert own["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert own["exported"] == [str(rank), "2", str(rank)]
        assert own["sum"] == 3.0
        assert own["any_of"] == [False, True, True]
        assert own["met"] == ["Interrupted", "interrupted by SIGUSR1; start the same command again to go on"]
        assert own["same_object"] is True
    assert sorted(own["reported"] for own in seen) == [0, 1]


def test_two_ranks_under_mpiexec(tmp_path):
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("no mpiexec")
    from conftest import TIMEOUT, clean_environment

    command = [mpiexec, "-n", "2", sys.executable, __file__, "cases", str(tmp_path)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [own["place"] for own in seen] == [[0, 2, 0, "mpi", True], [1, 2, 1, "mpi", False]]
    assert [own["sum"] for own in seen] == [3.0, 3.0]


def test_one_rank_needs_no_group_until_asked(tmp_path):
    from conftest import TIMEOUT, clean_environment

    command = [sys.executable, __file__, "alone", str(tmp_path)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    own = json.loads((tmp_path / "rank-0.json").read_text())
    assert own == {
        "group_at_start": False,
        "on_main": 7,
        "gathered": [5],
        "any_of": [False, True],
        "met": [None, ["Interrupted", "interrupted by SIGUSR1; start the same command again to go on"]],
        "agreed": ["ConfigError", "alone"],
        "group_when_asked": True,
        "sum": 1.0,
        "group_after_close": False,
        "accelerator": "cpu" if own["device"] == "cpu" else None,
        "device": own["device"],
    }


def test_paths_of_the_run_directory(tmp_path):
    run = RunDir(tmp_path)
    assert run.config == tmp_path / "config.yaml"
    assert run.environment == tmp_path / "environment.json"
    assert run.manifest == tmp_path / "manifest.json"
    assert run.scores_dir == tmp_path / "scores"
    assert run.scores == tmp_path / "scores.parquet"
    assert run.features_dir("content") == tmp_path / "features" / "content"
    assert run.features("content") == tmp_path / "features" / "content.npy"
    assert run.rejected == tmp_path / "rejected.jsonl"
    assert run.logs_dir == tmp_path / "logs"
    assert run.selection_dir("default") == tmp_path / "selection" / "default"


def test_create_refuses_a_run_and_overwrites_on_request(tmp_path):
    run = RunDir(tmp_path / "a" / "run")
    run.create(overwrite=False)
    run.config.write_text("{}")
    # A configuration alone is no result: a run that failed early may be started again.
    run.create(overwrite=False)
    run.scores_dir.mkdir()
    run.selection_dir("default").mkdir(parents=True)
    note = run.root / "notes.txt"
    note.write_text("the user's own")
    with pytest.raises(ConfigError, match=r"output_dir: .*holds a run already \(scores\).*--overwrite"):
        run.create(overwrite=False)
    assert run.scores_dir.exists()
    run.create(overwrite=True)
    assert sorted(path.name for path in run.root.iterdir()) == [".grads_dist", "notes.txt"]


OWN = ("config.yaml", "logs", "features", "scores", "selection", "scores.parquet", "manifest.json",
       "rejected.jsonl", "environment.json", "model", "checkpoints", "started.json",
       "batch_tokens.json")  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_a_folder_that_no_run_made_is_refused_and_spared(tmp_path, name, overwrite):
    (tmp_path / name).mkdir()
    (tmp_path / name / "exam.txt").write_text("precious")
    with pytest.raises(ConfigError, match=rf"output_dir: .*holds {name} but no \.grads_dist"):
        RunDir(tmp_path).create(overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "exam.txt").read_text() == "precious"


def test_overwrite_removes_what_a_run_writes_and_nothing_else(tmp_path):
    run = RunDir(tmp_path)
    run.create(overwrite=False)
    for name in (*OWN, "weights"):
        (run.root / name).mkdir()
    (run.root / "report.html").write_text("the user's own")
    run.create(overwrite=True)
    assert sorted(path.name for path in run.root.iterdir()) == [
        ".grads_dist", "report.html", "weights"
    ]  # fmt: skip


def test_overwrite_removes_links_and_not_what_they_point_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("precious")
    run = RunDir(tmp_path / "run")
    run.create(overwrite=False)
    (run.root / "features").symlink_to(elsewhere)
    (run.root / "config.yaml").symlink_to(elsewhere / "data")
    (run.root / "scores").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="holds a run already"):
        run.create(overwrite=False)
    run.create(overwrite=True)
    assert [path.name for path in run.root.iterdir()] == [".grads_dist"]
    assert (elsewhere / "data").read_text() == "precious"


def test_check_touches_nothing(tmp_path):
    run = RunDir(tmp_path / "a" / "run")
    run.check(overwrite=True)
    assert list(tmp_path.iterdir()) == []
    run.create(overwrite=False)
    run.manifest.write_text("{}")
    run.check(overwrite=True)
    assert sorted(path.name for path in run.root.iterdir()) == [".grads_dist", "manifest.json"]
    with pytest.raises(ConfigError, match="holds a run already"):
        run.check(overwrite=False)


def test_create_refuses_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir: .*cannot be written"):
        RunDir(tmp_path / "file" / "run").create(overwrite=False)


def test_atomic_write_shows_nothing_before_it_is_whole(tmp_path):
    path = tmp_path / "x.npy"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and temporary.suffix == ".npy"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_leaves_nothing_on_error(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_log_file_and_console_of_each_rank(tmp_path, capsys):
    names = ["grads_dist.part", "other.library"]
    try:
        logs.start_console(rank=2)
        path = logs.log_to_file(tmp_path / "logs", rank=2)
        assert path == tmp_path / "logs" / "rank-00002.log" == logs.log_path()
        for name in names:
            logging.getLogger(name).warning("careful")
        logging.getLogger(names[0]).info("progress")
        logs.record_failure(ValueError("deep inside"))
    finally:
        logs.stop_file()
    assert capsys.readouterr().err == "[rank 2] warning: careful\n"
    text = path.read_text()
    assert "WARNING grads_dist.part: careful" in text
    assert "WARNING other.library: careful" in text
    assert "INFO grads_dist.part: progress" in text
    assert "ValueError: deep inside" in text
    assert logs.log_path() is None


def test_a_run_that_goes_on_appends_to_its_log(tmp_path):
    try:
        for append, text in [(False, "first"), (True, "second")]:
            path = logs.log_to_file(tmp_path, rank=0, append=append)
            logging.getLogger("grads_dist").warning(text)
        assert "first" in path.read_text() and "second" in path.read_text()
        logs.log_to_file(tmp_path, rank=0)
    finally:
        logs.stop_file()
    assert path.read_text() == ""


def test_why_a_run_ended_lies_beside_its_logs(tmp_path):
    logs.record_cause(0, 1, "no log yet")
    try:
        logs.log_to_file(tmp_path, rank=2)
        logs.record_cause(3, 1, "rank 3 (host n2): é")
    finally:
        logs.stop_file()
    content = json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))
    time = datetime.datetime.fromisoformat(content.pop("time"))
    assert content == {"rank": 3, "code": 1, "message": "rank 3 (host n2): é"}
    assert time.tzinfo is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error.json", "rank-00002.log"]


def test_faults_of_the_file_system_are_lines():
    kept = "nothing that was complete is lost"
    again = "start the same command again"
    full = "No space left on device"
    told = [
        (OSError(errno.ENOSPC, full, "/x/y"), f"/x/y: {full}; {kept}; free space and {again}"),
        (OSError(errno.ENOSPC, full), f"{full}; {kept}; free space and {again}"),
        (
            OSError(errno.EDQUOT, "Error writing bytes to file"),
            f"[Errno {errno.EDQUOT}] Error writing bytes to file: Disk quota exceeded; {kept}; "
            f"free space or have the quota raised and {again}",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            f"/x: Permission denied; {kept}; give back the permission and {again}",
        ),
        (
            ValueError("I/O error: No space left on device (os error 28)"),
            f"I/O error: {full} (os error 28): {full}; {kept}; free space and {again}",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0\nmore"),
            "a checkpoint cannot be written (PytorchStreamWriter failed writing file data/0); "
            f"{kept}; free space and {again}",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), None),
        (RuntimeError("mat1 and mat2"), None),
    ]
    assert [explain_os_error(error) for error, _ in told] == [line for _, line in told]


def test_a_full_disk_is_recognised_from_what_libraries_raise():
    """/dev/full answers every write as a full disk does."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    def write_table():
        with open("/dev/full", "wb") as file:
            pq.write_table(pa.table({"x": list(range(1000))}), file)

    for write in (write_table, lambda: torch.save(torch.zeros(10**6), "/dev/full")):
        with pytest.raises((OSError, RuntimeError)) as caught:
            write()
        assert "free space and start the same command again" in str(explain_os_error(caught.value))


def test_a_port_in_use_is_one_line(tmp_path):
    from conftest import TIMEOUT, clean_environment

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = clean_environment(
            RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        command = [sys.executable, "-m", "grads_dist", "select", "--output_dir", "none"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("grads-dist:")]
    assert lines == [
        f"grads-dist: error: MASTER_ADDR:MASTER_PORT: 127.0.0.1:{port}, where rank 0 "
        f"({socket.gethostname()}) listens, is in use, mostly by another run on the node; "
        "allowed: another port, set as MASTER_PORT or as the launcher's option"
    ]
    assert "Traceback" not in done.stderr, done.stderr


def test_ranks_do_not_wait_for_an_agent_that_is_gone(tmp_path):
    """torchrun's agent holds the store and dies while its rank imports: nobody is left to end the rank."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(nobody.getsockname()[1])}
        placement = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        done = subprocess.run(
            [sys.executable, "-m", "grads_dist", "select", "--output_dir", str(tmp_path)],
            env=clean_environment(**placement, **address),
            text=True,
            capture_output=True,
            timeout=100,
        )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("grads-dist: error:")]
    assert len(lines) == 1 and "rank 0" in lines[0] and "did not meet" in lines[0], done.stderr


def test_rank_0_prints_progress_without_a_prefix(capsys):
    logs.start_console(rank=0)
    logging.getLogger("grads_dist.part").info("progress")
    assert capsys.readouterr().err == "progress\n"


def _raised(call):
    try:
        call()
    except GradsDistError as error:
        return [type(error).__name__, str(error)]
    return None


def _fail_with(error):
    raise error


def _meet(ranks, asked):
    from grads_dist.runtime import stopping

    if asked:
        stopping.request("SIGUSR1")
    ranks.meet()


def _several(ranks, placement):
    import torch
    import torch.distributed as dist

    from grads_dist.runtime.ranks import Ranks

    def slow():
        time.sleep(0.3)
        return {"by": ranks.rank, "slow": True}

    reports = []
    ranks.report_once(lambda: reports.append(1))
    total = torch.tensor([ranks.rank + 1.0])
    ranks.ensure_group()
    total = total.to(ranks.device)
    dist.all_reduce(total)
    return {
        "place": [ranks.rank, ranks.world_size, ranks.local_rank, placement.launcher, ranks.is_main],
        "on_main": ranks.on_main(slow),
        "main_error": _raised(lambda: ranks.on_main(lambda: _fail_with(DataError("bad rows")))),
        "agreed": _raised(lambda: ranks.agree(ConfigError("only rank 1") if ranks.rank == 1 else None)),
        "lowest": _raised(lambda: ranks.agree(DataError(f"rank {ranks.rank}"))),
        "no_error": ranks.agree(None) is None,
        "gathered": ranks.gather({"rank": ranks.rank}),
        "exported": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")],
        "sum": float(total),
        "any_of": ranks.any_of(False, ranks.rank == 1, True),
        "met": _raised(lambda: _meet(ranks, ranks.rank == 1)),
        "same_object": Ranks.start(placement) is ranks,
        "reported": len(reports),
    }


def _alone(ranks):
    import torch
    import torch.distributed as dist

    own = {
        "group_at_start": dist.is_initialized(),
        "on_main": ranks.on_main(lambda: 7),
        "gathered": ranks.gather(5),
        "any_of": ranks.any_of(False, True),
        "met": [_raised(ranks.meet), _raised(lambda: _meet(ranks, True))],
        "agreed": _raised(lambda: ranks.agree(ConfigError("alone"))),
        "accelerator": os.environ.get("DS_ACCELERATOR"),
        "device": ranks.device.type,
    }
    ranks.ensure_group()
    total = torch.ones(1, device=ranks.device)
    dist.all_reduce(total)
    own |= {"group_when_asked": dist.is_initialized(), "sum": float(total)}
    ranks.close()
    return own | {"group_after_close": dist.is_initialized()}


def _main(case, folder):
    from grads_dist.runtime.ranks import Ranks

    placement = launcher.detect()
    ranks = Ranks.start(placement)
    own = _alone(ranks) if case == "alone" else _several(ranks, placement)
    (Path(folder) / f"rank-{ranks.rank}.json").write_text(json.dumps(own))
    ranks.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
