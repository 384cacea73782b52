"""Trackers: refused before any work, fed by rank 0, dropped with a warning when they fail."""

from __future__ import annotations

import importlib.util
import json
import logging
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import clean_environment
from workspace import make_model, make_rows, run_arguments, run_program, write_jsonl

from grads_dist.config import load_config
from grads_dist.errors import ConfigError
from grads_dist.runtime.trackers import Trackers, check_trackers, open_trackers

CONFIG = {"probe": {"mode": "frozen", "seed": 3}, "output_dir": "run"}


def needs(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed (pip install {name})")


class Fake:
    """A tracker that fails from its `good`-th call on."""

    def __init__(self, good: int, error: Exception | None = None) -> None:
        self.left, self.error, self.got = good, error, []

    def log(self, record, step):
        if self.error is not None and len(self.got) >= self.left:
            raise self.error
        self.got.append((record, step))

    def close(self):
        self.log({}, -1)


def test_one_that_fails_is_dropped_with_one_warning_and_the_others_go_on(caplog):
    bad, good = Fake(1, ConnectionError("no\nroute")), Fake(0)
    trackers = Trackers({"bad": (bad, (OSError,)), "good": (good, (OSError,))})
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            trackers.log({"loss": 1.0}, step)
        trackers.close()
    assert [step for _, step in bad.got] == [0]
    assert [step for _, step in good.got] == [0, 1, 2, 3, -1]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["report_to: bad failed and gets no more numbers (no route)"]


def test_one_that_fails_at_the_end_does_not_fail_the_run(caplog):
    trackers = Trackers({"bad": (Fake(0, OSError("disk full")), (OSError,))})
    with caplog.at_level(logging.WARNING):
        trackers.close()
    assert "disk full" in caplog.text and trackers.names == []


def test_a_fault_of_ours_is_not_hidden():
    trackers = Trackers({"bad": (Fake(0, TypeError("a bug")), (OSError,))})
    with pytest.raises(TypeError, match="a bug"):
        trackers.log({"loss": 1.0}, 0)


def test_one_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to: 'trackio' is not installed; .*`pip install trackio`"):
        check_trackers(["trackio"])


def test_a_folder_of_the_name_is_no_package(tmp_path: Path):
    """wandb leaves a folder of its name where it ran; with `python -m` that folder is on the path."""
    (tmp_path / "wandb").mkdir()
    hide = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [sys.argv[1]]\n"
    check = "from grads_dist.runtime.trackers import check_trackers\n"
    script = f"{check}{hide}check_trackers(['wandb'])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=clean_environment(), text=True, capture_output=True
    )
    assert "ConfigError: report_to: 'wandb' is not installed" in done.stderr


def test_none_is_imported_unless_named():
    script = (
        "import sys, pathlib\n"
        "from grads_dist.runtime.trackers import check_trackers, open_trackers\n"
        "check_trackers([]); open_trackers([], {}, pathlib.Path('nowhere'), 'run').close()\n"
        "print(sorted({'torch', 'wandb', 'tensorboard', 'trackio'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(), text=True, capture_output=True
    )
    assert done.stdout == "[]\n", done.stderr


def test_one_that_cannot_start_is_dropped(monkeypatch, tmp_path: Path, caplog):
    fake = types.ModuleType("trackio")

    def init(**options: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin="here"))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with caplog.at_level(logging.WARNING):
        trackers = open_trackers(["trackio"], CONFIG, tmp_path, "run")
    assert trackers.names == [] and "trackio failed" in caplog.text and "database is locked" in caplog.text


@needs("tensorboard")
def test_tensorboard_has_the_numbers_and_the_configuration(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(["tensorboard", "tensorboard"], CONFIG, tmp_path, "run")
    assert trackers.names == ["tensorboard"]
    trackers.log({"probe/loss": 2.5}, 10)
    trackers.log({"probe/loss": 1.5}, 20)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("probe/loss")] == [(10, 2.5), (20, 1.5)]
    trackers.close()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("config/text_summary")
    assert "probe.seed: 3" in event.tensor_proto.string_val[0].decode()


@needs("wandb")
def test_wandb_runs_offline(tmp_path: Path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = open_trackers(["wandb"], CONFIG, tmp_path / "logs", "myrun")
    # Steps of a second pass begin at 0 again.
    for step in (10, 20, 0):
        trackers.log({"probe/loss": float(step)}, step)
    trackers.close()
    wandb.teardown()  # Its service writes the file, and this waits for it.
    (written,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    assert all(text in content for text in (b"probe/loss", b"myrun", b"grads_dist", b"frozen"))


KILL_WANDB = """
import os, pathlib, signal, sys, time
from grads_dist.runtime.trackers import open_trackers
trackers = open_trackers(["wandb"], {}, pathlib.Path(sys.argv[1]), "myrun")
trackers.log({"loss": 1.0}, 1)
children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
for child in children:
    if b"wandb" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
        os.kill(int(child), signal.SIGKILL)
for step in range(100):
    trackers.log({"loss": 1.0}, step)
    if not trackers.names:
        break
    time.sleep(0.1)
trackers.close()
print("went on")
"""


@needs("wandb")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to find the service by")
def test_a_run_goes_on_when_the_service_of_wandb_dies(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", KILL_WANDB, str(tmp_path)],
        env=clean_environment(WANDB_MODE="offline", WANDB_SILENT="true"),
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert done.stderr.count("report_to: wandb failed") == 1


@needs("wandb")
def test_wandb_without_a_key_is_refused_in_one_line(tmp_path: Path, monkeypatch):
    import wandb

    def init(**options: object) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty).\ncall wandb.login")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match="report_to: 'wandb' cannot start .*WANDB_MODE=offline") as caught:
        open_trackers(["wandb"], CONFIG, tmp_path, "run")
    assert "\n" not in str(caught.value)


@needs("trackio")
def test_trackio_keeps_the_numbers(tmp_path: Path):
    script = (
        "import sys, pathlib\n"
        "from grads_dist.runtime.trackers import open_trackers\n"
        "trackers = open_trackers(['trackio'], {'seed': 3}, pathlib.Path(sys.argv[1]), 'myrun')\n"
        "trackers.log({'probe/loss': 2.5}, 10); trackers.log({'probe/loss': 1.5}, 0); trackers.close()\n"
    )
    environment = clean_environment(TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # standard output is that of the command
    (database,) = (tmp_path / "trackio").glob("grads_dist*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(run, step) for run, step, _ in rows] == [("myrun", 0), ("myrun", 10)]
    assert [json.loads(metrics) for _, _, metrics in rows] == [{"probe/loss": 1.5}, {"probe/loss": 2.5}]


def test_the_configuration_takes_a_list_of_known_names(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {path: a.jsonl}\nreport_to: [tensorboard, wandb]\n")
    assert load_config(path).report_to == ["tensorboard", "wandb"]
    path.write_text("data: {path: a.jsonl}\n")
    assert load_config(path).report_to == []
    path.write_text("data: {path: a.jsonl}\nreport_to: [mlflow]\n")
    with pytest.raises(ConfigError, match="report_to.*mlflow.*wandb.*tensorboard.*trackio"):
        load_config(path)


def test_a_missing_tracker_is_refused_before_any_work(tmp_path: Path):
    make_model(tmp_path / "model")
    write_jsonl(tmp_path / "corpus.jsonl", make_rows(8))
    # A package of that name without a file to import it from.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'trackio' else find(name, package)\n"
    )
    arguments = run_arguments(tmp_path, "run", report_to="[trackio]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "site"))
        done = run_program("probe", *arguments)
    assert done.returncode == 2, done.stderr
    assert "report_to: 'trackio' is not installed" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run" / "config.yaml").exists()
