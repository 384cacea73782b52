"""The command line: what users see and exit codes. As a script, this file is a rank whose command fails."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import clean_environment

from grads_dist import cli, commands
from grads_dist.commands import COMMANDS, Command, prepare
from grads_dist.config import Config, TableConfig, save_config
from grads_dist.data.config import DataConfig
from grads_dist.errors import ConfigError, DataError, Interrupted
from grads_dist.identity import Share
from grads_dist.model.config import ModelConfig
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime import launcher, logs
from grads_dist.selection.config import SelectionConfig

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "faiss", "mpi4py", "pyarrow")


def use(monkeypatch, action):
    """Let the command `run` do `action`, whatever its arguments."""
    monkeypatch.setitem(COMMANDS, "run", Command("test", lambda args: action, True))


def failing(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["select", "--help"],
        ["demo", "-h"],
        ["--version"],
        ["run", "--data.path=x", "--print_config"],
    ],
)
@pytest.mark.parametrize("left_over", [{}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_help_imports_nothing_heavy_and_waits_for_no_rank(args, left_over):
    code = (
        "import sys\nfrom grads_dist.cli import main\n"
        f"try: code = main({args})\nexcept SystemExit as e: code = e.code\n"
        f"assert code == 0, code\nprint('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=clean_environment() | left_over,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr


def test_overview_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("run", "probe", "select", "inspect", "demo"))


def test_no_command_is_bad_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: grads-dist COMMAND" in capsys.readouterr().out


def test_a_bad_value_is_one_line_and_code_2(program):
    done = program("run", "--data.path", "x", "--probe.mode", "foo")
    assert done.returncode == 2
    assert done.stderr == "grads-dist: error: probe.mode: 'foo' is not allowed; allowed: train, frozen\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "command: 'nope' is not known; allowed: run, probe, select, merge, status, inspect, "),
        (["run", "--data.path=x"], "model.name_or_path: not given, but needed"),
        (["probe", "--data.path=x"], "model.name_or_path: not given, but needed"),
        (["inspect", "--data.path=x", "--model.name_or_path=m", "--count=0"], "count: 0 is not allowed"),
        (["inspect", "--count", "x"], "count: 'x' is not allowed; allowed: a whole number"),
        (["run", "--overwrite=true"], "overwrite: 'true' is not allowed; --overwrite takes no value"),
        (["demo", "--output_dir", "."], "output_dir: '.' is not allowed; allowed: a folder with a name"),
        (["demo", "--processes", "0"], "processes: 0 is not allowed"),
        (["demo", "--data.path", "x"], "arguments: '--data.path' is not allowed; allowed: --output_dir"),
        (["select", "--output_dir", "none"], "output_dir: 'none' holds no config.yaml"),
        (["select", "--output_dir", "none", "--overwrite"], "output_dir: 'none' holds no config.yaml"),
        (
            ["select", "--features", "x.npy"],
            "features: 'x.npy' is given without a table; allowed: beside --table",
        ),
        (["select", "--table", "x.parquet", "--data.limit=1"], "data.path: not given, but --data.limit=1 is"),
        (["select", "--table", "x.parquet", "--probe.mode=frozen"], "probe.mode: no such flag"),
        (
            ["select", "--compare", "--selection.rows=1"],
            "arguments: '--selection.rows=1' is not allowed beside",
        ),
        (["run", "--data.path=x", "--selection.rows=3", "--selection.fraction=0.1"], "selection."),
    ],
)
def test_bad_usage(capsys, args, message):
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"grads-dist: error: {message}")
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_demo_starts_its_own_ranks(monkeypatch):
    monkeypatch.setattr(commands, "detect", lambda: launcher.Placement(world_size=2))
    with pytest.raises(ConfigError, match="demo: 2 ranks are running it; allowed: one"):
        prepare(["demo"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a: 1\nis bad"), 2, "grads-dist: error: a: 1 is bad\n"),
        (DataError("no row"), 3, "grads-dist: error: no row\n"),
        (Interrupted("stopped"), 4, "grads-dist: error: stopped\n"),
        (KeyboardInterrupt(), 4, "grads-dist: error: interrupted\n"),
    ],
)
def test_expected_failures(monkeypatch, capsys, error, code, line):
    use(monkeypatch, failing(error))
    assert cli.main(["run"]) == code
    assert capsys.readouterr().err == line


def test_an_unexpected_failure_is_one_line_and_a_traceback_in_the_log(monkeypatch, capsys, tmp_path):
    def action():
        logs.log_to_file(tmp_path, rank=0)
        raise ZeroDivisionError("deep\ninside")

    use(monkeypatch, action)
    try:
        assert cli.main(["run"]) == 1
    finally:
        logs.stop_file()
    log = tmp_path / "rank-00000.log"
    line = f"grads-dist: error: ZeroDivisionError: deep inside (traceback in {log})\n"
    assert capsys.readouterr().err == line
    assert "in action\n" in log.read_text() and "ZeroDivisionError: deep" in log.read_text()
    ended = json.loads((tmp_path / "error.json").read_text())
    assert (ended["code"], ended["rank"]) == (1, 0) and ended["message"].startswith("ZeroDivisionError: deep")


def test_a_full_disk_is_one_line_without_a_traceback(monkeypatch, capsys):
    use(monkeypatch, failing(OSError(errno.ENOSPC, "No space left on device", "/run/scores")))
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err == (
        "grads-dist: error: /run/scores: No space left on device; nothing that was complete is lost; "
        "free space and start the same command again\n"
    )


def test_signals_are_handled_while_a_collective_command_runs(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGUSR1)
    use(monkeypatch, lambda: signal.raise_signal(signal.SIGUSR1))
    assert cli.main(["run"]) == 4
    line = "grads-dist: error: interrupted by SIGUSR1; start the same command again to go on\n"
    assert capsys.readouterr().err == line
    assert signal.getsignal(signal.SIGUSR1) == before


def test_an_unexpected_failure_without_a_log_shows_the_traceback(monkeypatch, capsys):
    use(monkeypatch, failing(ZeroDivisionError("deep")))
    assert cli.main(["run"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("grads-dist: error: ZeroDivisionError: deep (traceback above)\n")


def test_text_of_a_command_is_printed(monkeypatch, capsys):
    use(monkeypatch, lambda: "what it did")
    assert cli.main(["run"]) == 0
    assert capsys.readouterr().out == "what it did\n"


@pytest.mark.parametrize("args", [[], ["run", "--help"], ["run", "--data.path", "x", "--print_config"]])
def test_a_reader_that_goes_is_no_failure(args):
    """`| head` closes the pipe; here it is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "grads_dist", *args]
    with os.fdopen(writing) as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0 if args else 2, "")


def test_the_deepspeed_launcher_adds_an_argument_that_is_ignored(monkeypatch, capsys):
    seen = []
    monkeypatch.setitem(
        COMMANDS, "run", Command("test", lambda args: seen.append(args) or (lambda: None), True)
    )
    assert cli.main(["--local_rank=1", "run", "--a", "b"]) == 0
    assert cli.main(["--local-rank=0", "run"]) == 0
    assert seen == [["--a", "b"], []]


def test_print_config_is_a_config_file(program, tmp_path):
    done = program("run", "--data.path", "x.jsonl", "--probe.mode", "frozen", "--print_config")
    assert done.returncode == 0
    printed = yaml.safe_load(done.stdout)
    assert printed["data"]["path"] == "x.jsonl" and printed["probe"]["mode"] == "frozen"
    (tmp_path / "c.yaml").write_text(done.stdout)
    again = program("run", "--config", "c.yaml", "--print_config")
    assert again.stdout == done.stdout


@pytest.fixture
def stages(monkeypatch):
    """What each stage is called with, instead of the stages."""
    calls = []

    class Pipeline:
        @staticmethod
        def run(config, overwrite):
            calls.append(("run", config, overwrite))

        @staticmethod
        def probe(config, overwrite, share):
            calls.append(("probe", config, overwrite, share))

    class Selecting:
        @staticmethod
        def select(config):
            calls.append(("select", config))

        @staticmethod
        def select_table(config, table, features):
            calls.append(("select_table", config, table, features))

        @staticmethod
        def compare(output_dir, names):
            calls.append(("compare", output_dir, names))

    import grads_dist

    for name, stage in {"pipeline": Pipeline, "selecting": Selecting}.items():
        monkeypatch.setitem(sys.modules, f"grads_dist.{name}", stage)
        monkeypatch.setattr(grads_dist, name, stage, raising=False)
    return calls


def test_stages_get_the_configuration_and_the_flags(stages):
    config = Config(data=DataConfig(path="x"), model=ModelConfig(name_or_path="m"))
    given = ["--data.path", "x", "--model.name_or_path", "m"]
    prepare(["run", *given])()
    prepare(["probe", *given, "--overwrite"])()
    frozen = replace(config, probe=ProbeConfig(mode="frozen"))
    prepare(["probe", *given, "--probe.mode", "frozen", "--shard", "2/3"])()
    assert stages == [
        ("run", config, False),
        ("probe", config, True, None),
        ("probe", frozen, False, Share(2, 3)),
    ]


def test_a_saved_run_is_repeated_by_its_config(stages, tmp_path):
    config = Config(
        data=DataConfig(path=["x", "y"]),
        model=ModelConfig(name_or_path="m"),
        selection=SelectionConfig(tokens=5),
        output_dir=str(tmp_path),
    )
    save_config(config, tmp_path / "config.yaml")
    prepare(["run", "--config", str(tmp_path / "config.yaml"), "--overwrite"])()
    assert stages == [("run", config, True)]


def test_select_starts_from_the_run_and_its_budget_is_replaced(stages, tmp_path, monkeypatch):
    config = Config(
        data=DataConfig(path="x"), selection=SelectionConfig(fraction=0.2), output_dir="where/it/was/before"
    )
    save_config(config, tmp_path / "config.yaml")
    moved = str(tmp_path)
    prepare(["select", "--output_dir", moved, "--selection.name=small", "--selection.rows", "100"])()
    ((_, selected),) = stages
    assert selected == Config(
        data=DataConfig(path="x"), selection=SelectionConfig(name="small", rows=100), output_dir=moved
    )


def test_select_defaults_to_the_folder_run(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    save_config(Config(data=DataConfig(path="x")), tmp_path / "run" / "config.yaml")
    prepare(["select"])()
    assert stages == [("select", Config(data=DataConfig(path="x")))]


def test_select_takes_a_table_that_no_probe_wrote(stages):
    budget = ["--selection.rows", "3"]
    prepare(["select", "--table", "t.parquet", "--features=f.npy", "--output_dir", "out", *budget])()
    prepare(["select", "--table=t.parquet", "--data.path", "x", "--data.limit", "9"])()
    first = TableConfig(selection=SelectionConfig(rows=3), output_dir="out")
    second = TableConfig(data=DataConfig(path="x", limit=9))
    assert stages == [
        ("select_table", first, "t.parquet", "f.npy"),
        ("select_table", second, "t.parquet", None),
    ]


def test_select_compares_what_is_there(stages):
    prepare(["select", "--compare", "a", "b", "--output_dir", "out"])()
    prepare(["select", "--compare"])()
    assert stages == [("compare", "out", ["a", "b"]), ("compare", "run", [])]


def test_a_bad_argument_under_two_ranks_is_one_line(torchrun):
    done = torchrun(2, Path(cli.__file__).parent / "__main__.py", "run", "--config", "missing.yaml")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("grads-dist:")]
    assert ours == ["grads-dist: error: config: 'missing.yaml' cannot be read (No such file or directory); "
                    "allowed: a YAML file"]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "codes", "lines"),
    [
        ("agreed", [3, 3], ["grads-dist: error: only rank 1 saw it"]),
        ("alone_1", [3, 3], ["grads-dist: error: rank 1 (host HOST): left alone"]),
        (
            "main_breaks",
            [1, 1],
            ["grads-dist: error: rank 0 (host HOST): ZeroDivisionError: on rank 0 (traceback above)"],
        ),
        ("main_only", [0, 0], []),
        (
            "same_gpu",
            [2, 2],
            [
                "grads-dist: error: ranks per node: ranks 0 and 1 (host n0) have the same GPU (gpu0); "
                "allowed: one rank a GPU, and each rank shown its own if it is shown one"
            ],
        ),
        (
            "interrupt_1",
            [4, 4],
            ["grads-dist: error: interrupted by SIGUSR1; start the same command again to go on"],
        ),
    ],
)
def test_no_failure_of_one_rank_leaves_the_other_waiting(bare_ranks, case, codes, lines):
    results = bare_ranks(2, [sys.executable, __file__, case])
    errors = "".join(err for _, _, err in results)
    lines = [line.replace("HOST", socket.gethostname()) for line in lines]
    assert [line for line in errors.splitlines() if line.startswith("grads-dist:")] == lines, errors
    assert [code for code, _, _ in results] == codes, errors
    assert results[0][1] == ("printed by rank 0\n" if case == "main_only" else "")
    assert results[1][1] == ""


def _case(name):
    from grads_dist.runtime.ranks import Ranks

    ranks = Ranks.start(launcher.detect())
    if name == "main_only":
        return "printed by rank 0" if ranks.is_main else _break()
    alone = ranks.rank == 1
    if name == "agreed":
        ranks.agree(DataError("only rank 1 saw it") if alone else None)
    elif name == "alone_1" and alone:
        raise DataError("left alone")
    elif name == "interrupt_1" and alone:
        signal.raise_signal(signal.SIGUSR1)
    elif name == "main_breaks":
        ranks.on_main(_break)
    ranks.gather("still here")


def _break():
    raise ZeroDivisionError("on rank 0")


if __name__ == "__main__":
    case = sys.argv[1]
    if case == "same_gpu":
        from grads_dist.runtime import ranks

        ranks._own_gpu = lambda device: ranks.Gpu("n0", "boot0", "gpu0")
    commands.COMMANDS["run"] = Command("test", lambda args: lambda: _case(case), case != "main_only")
    sys.exit(cli.main(["run"]))
