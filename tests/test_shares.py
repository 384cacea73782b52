"""Runs over shares of a corpus, joined, are the run over all of it; `status` says how far a run is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from score_tables import faults_between, numels, read_features, read_scores
from workspace import make_model, make_rows, run_arguments, run_program, write_jsonl

from grads_dist.commands import prepare
from grads_dist.errors import ConfigError, DataError
from grads_dist.status import describe

NUM_ROWS = 31
BOUND = 32 * float(np.finfo(np.float32).eps)
UNUSABLE = {"messages": [{"role": "user", "content": "loss"}]}
FROZEN = {"probe__mode": "frozen"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, a run over a corpus with rows that cannot be used, and `part1` to `part3`, its shares."""
    folder = tmp_path_factory.mktemp("shares")
    make_model(folder / "model")
    rows = make_rows(NUM_ROWS)
    rows[3], rows[20] = UNUSABLE, UNUSABLE
    write_jsonl(folder / "corpus.jsonl", rows)
    commands = [["run", *run_arguments(folder, "whole", **FROZEN)]]
    commands += [
        ["probe", "--shard", f"{n}/3", *run_arguments(folder, f"part{n}", **FROZEN)] for n in (1, 2, 3)
    ]
    for command in commands:
        done = run_program(*command)
        assert done.returncode == 0, done.stderr
    return folder


def merge(folder: Path, *names: str, output: str, flags: tuple[str, ...] = ()) -> str | None:
    runs = [str(folder / name) for name in names]
    return prepare(["merge", *runs, "--output_dir", str(folder / output), *flags])()


@pytest.fixture(scope="module")
def merged(folder: Path) -> Path:
    text = merge(folder, "part3", "part1", "part2", output="merged")
    assert (
        text == f"merged {NUM_ROWS - 2} rows of 3 shares (2 rejected): {folder / 'merged' / 'scores.parquet'}"
    )
    return folder / "merged"


def test_the_table_and_the_features_are_those_of_the_whole(folder, merged):
    found, truth = read_scores(merged), read_scores(folder / "whole")
    assert found["index"].to_pylist() == truth["index"].to_pylist()
    faults = faults_between(found, truth, numels(folder / "whole"), BOUND)
    assert not faults, "\n".join(faults)
    np.testing.assert_allclose(
        read_features(merged), read_features(folder / "whole"), rtol=2.0**-10, atol=1e-6
    )


def test_rejected_rows_too(folder, merged):
    assert (merged / "rejected.jsonl").read_text() == (folder / "whole" / "rejected.jsonl").read_text()


def test_a_selection_goes_on_from_it(folder, merged):
    done = run_program("select", "--output_dir", str(merged))
    assert done.returncode == 0, done.stderr
    picked = [run / "selection" / "default" / "subset.jsonl" for run in (merged, folder / "whole")]
    assert picked[0].read_bytes() == picked[1].read_bytes()


def test_the_merged_run_is_a_finished_run_of_the_same_configuration(folder, merged):
    done = run_program("run", *run_arguments(folder, "merged", **FROZEN))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"probed {NUM_ROWS - 2} rows by an earlier start")


def test_the_manifest_is_of_all_shares(folder, merged):
    found, whole = (json.loads((run / "manifest.json").read_text()) for run in (merged, folder / "whole"))
    assert found["plan"]["rows"] == NUM_ROWS - 2
    assert found["targets"] == whole["targets"]
    assert found["merged"] == [str(folder / f"part{n}") for n in (1, 2, 3)]
    assert found["lm_head"] == whole["lm_head"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("part1", "part3"), "no run of share 2/3"),
        (("part1", "part2", "part3", "part3"), "share 3/3 is given twice"),
        (("part1", "part2", "whole"), "'.*whole' probed a whole corpus"),
        (("part1", "part2", "model"), "'.*model' is no run"),
        (("part1", "part2", "part4"), "'.*part4' is not finished"),
        (("part1", "part2", "part5"), "'.*part5' is not of the same probe .*: probe.seed was 0 and is 1"),
        (("part1", "part2", "part6"), "'.*part6' is not of the same probe .*: --shard was 1/3 and is 3/4"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(folder, names, message):
    for name in ("part4", "part5", "part6"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "part3", folder / name)
    (folder / "part4" / "manifest.json").unlink()
    for name, key, value in (("part5", "seed", 1), ("part6", "share", "3/4")):
        path = folder / name / "started.json"
        started = json.loads(path.read_text())
        (started if key == "share" else started["config"]["probe"])[key] = value
        path.write_text(json.dumps(started))
    with pytest.raises(ConfigError, match=message):
        merge(folder, *names, output="refused")
    assert not (folder / "refused").exists()


def test_a_merge_that_was_cut_off_starts_again(folder, merged):
    shutil.copytree(merged, folder / "cut")
    started = folder / "cut" / "started.json"
    started.write_text(json.dumps({**json.loads(started.read_text()), "clearing": True}))
    (folder / "cut" / "manifest.json").unlink()
    (folder / "cut" / ".merge-x").mkdir()
    assert merge(folder, "part1", "part2", "part3", output="cut")
    assert read_scores(folder / "cut").equals(read_scores(merged))
    assert not (folder / "cut" / ".merge-x").exists()


def test_a_row_that_is_in_no_share_is_missed(folder):
    shutil.copytree(folder / "part3", folder / "short")
    path = folder / "short" / "rejected.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="row 20 is missing"):
        merge(folder, "part1", "part2", "short", output="short-merged")


def test_an_earlier_run_stays_unless_it_may_go(folder, merged):
    with pytest.raises(ConfigError, match="holds a run already"):
        merge(folder, "part1", "part2", "part3", output="merged")
    assert merge(folder, "part1", "part2", "part3", output="merged", flags=("--overwrite",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/3"], "shard: '0/3' is not allowed; allowed: i/n with i from 1 to n"),
        (["--shard", "4/3"], "shard: '4/3'"),
        (["--shard", "1"], "shard: '1'"),
        (["--shard", "1/2", "--probe.mode", "train"], "shard: only probe.mode frozen can probe a share"),
    ],
)
def test_bad_shares(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        prepare(["probe", *run_arguments(folder, "bad", **FROZEN), *arguments])


def test_more_shares_than_rows(folder):
    done = run_program("probe", "--shard", "1/1000", *run_arguments(folder, "bad", **FROZEN))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"shard: 1/1000 of {NUM_ROWS} rows holds none; allowed: at most 31"
    )
    assert not (folder / "bad").exists()


def test_status_of_a_finished_run(folder):
    lines = dict(line.split(None, 1) for line in describe(str(folder / "whole")).splitlines())
    assert lines["run"].endswith(f"(frozen mode, {NUM_ROWS - 2} usable rows)")
    assert lines["state"] == "finished; selections: default"
    assert "rows/s" in lines["rate"] and "on 1 rank, in pass probe" in lines["rate"]


def test_status_of_a_stopped_run(folder):
    shutil.copytree(folder / "whole", folder / "half")
    (folder / "half" / "manifest.json").unlink()
    shards = sorted((folder / "half" / "scores").iterdir())
    shards[-1].unlink()
    error = {"time": "2026-01-01T00:00:00+00:00", "rank": 3, "code": 1, "message": "rank 3: gone"}
    (folder / "half" / "logs" / "error.json").write_text(json.dumps(error))
    text = describe(str(folder / "half"))
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    assert lines["state"].strip() == "stopped; the same command goes on with it"
    assert lines["probe"].strip() == "16 of 29 rows written (55 %)"
    assert lines["last error"].strip().startswith("rank 3: gone (rank 3, ")


def test_status_of_no_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        describe(str(tmp_path))
    for arguments in ([], ["a", "b"], ["--x"]):
        with pytest.raises(ConfigError, match="name one run directory"):
            prepare(["status", *arguments])
