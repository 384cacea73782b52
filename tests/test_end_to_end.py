"""The command line from a corpus to a subset: what it writes, what it survives, and how it ends."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from workspace import make_model, make_rows, run_arguments, run_program, run_python, write_jsonl, write_stage

MAX_LENGTH = 48
NUM_ROWS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a corpus."""
    folder = tmp_path_factory.mktemp("user")
    make_model(folder / "model")
    write_jsonl(folder / "corpus.jsonl", make_rows(NUM_ROWS))
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The run directory of a finished run."""
    done = run_program("run", *run_arguments(folder, "run", selection__fraction=0.3))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def rejected(run: Path) -> dict[int, str]:
    lines = (run / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [(entry["index"], entry["reason"]) for entry in map(json.loads, lines)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_every_file_is_there(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    fixed = {name for name in files if "shard-" not in name}
    assert fixed == {
        ".grads_dist",
        "config.yaml",
        "environment.json",
        "manifest.json",
        "scores.parquet",
        "features/content.npy",
        "rejected.jsonl",
        *(
            f"similarity/content/{name}"
            for name in (".lock", "graph.json", "ids.npy", "cosine.npy", "group.npy")
        ),
        "selection/default/subset.jsonl",
        "selection/default/selected.parquet",
        "selection/default/summary.json",
        "selection/default/README.md",
        "selection/default/dataset_info.json",
        "selection/default/axolotl.yaml",
        "logs/rank-00000.log",
        "logs/metrics-00000.jsonl",
        "started.json",
    }
    assert any(name.startswith("scores/shard-") for name in files)
    assert any(name.startswith("features/content/shard-") for name in files)


def test_table_has_the_documented_columns(finished):
    schema = pq.read_schema(finished / "scores.parquet")
    found = {field.name: str(field.type) for field in schema}
    expected = {"index": "int64", "id": "string", "status": "string", "token_hash": "int64"}
    expected |= {"num_tokens": "int32", "num_label_tokens": "int32", "step": "int32"}
    expected |= {"checkpoint": "int32"}
    expected |= {"loss": "float", "el2n": "float"}
    for target in ("embedding", "lm_head"):
        expected |= {f"{target}.{name}": "double" for name in ("sum", "sumsq")}
        expected |= {f"{target}.{name}": "float" for name in ("min", "max", "mean", "std", "norm")}
        expected[f"{target}.nonfinite"] = "int64"
    assert found == expected


def test_every_row_is_in_the_table_once(finished):
    table = pq.read_table(finished / "scores.parquet")
    assert table["index"].to_pylist() == list(range(NUM_ROWS))
    assert table["id"].to_pylist() == [row["id"] for row in make_rows(NUM_ROWS)]
    assert rejected(finished) == {}


def test_features_are_aligned_with_the_table(finished):
    """Rows of equal tokens have equal features, others do not."""
    table = pq.read_table(finished / "scores.parquet")
    features = np.load(finished / "features" / "content.npy")
    assert features.shape == (NUM_ROWS, 16) and features.dtype == np.float16
    vectors = features.astype(np.float64)
    hashes = table["token_hash"].to_numpy()
    near = np.abs(vectors[:, None] - vectors[None]).max(-1) <= 2.0**-9 * np.abs(vectors).max()
    np.testing.assert_array_equal(near, hashes[:, None] == hashes[None])


def test_subset_holds_the_original_lines(finished, folder):
    lines = (folder / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    selected = pq.read_table(finished / "selection" / "default" / "selected.parquet")["index"].to_pylist()
    assert len(selected) == 9
    subset = (finished / "selection" / "default" / "subset.jsonl").read_bytes()
    assert subset == b"".join(lines[i] for i in selected)


def test_manifest_and_environment(finished):
    manifest, environment = read_json(finished / "manifest.json"), read_json(finished / "environment.json")
    assert manifest["schema"] == 2
    assert manifest["targets"]["embedding"]["numel"] == manifest["targets"]["lm_head"]["numel"] > 0
    assert manifest["features"] == {"content": {"weights": "initial"}}
    assert manifest["plan"]["rows"] == NUM_ROWS and manifest["plan"]["optimizer_steps"] == 4
    assert environment["world_size"] == 1 and environment["device"] == "cpu"
    assert environment["versions"]["torch"]


def test_the_saved_configuration_repeats_the_run(finished, folder):
    replay = folder / "replay"
    config = finished / "config.yaml"
    done = run_program("run", "--config", str(config), "--output_dir", str(replay), "--overwrite")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(replay / "scores.parquet").equals(pq.read_table(finished / "scores.parquet"))
    for name in ("features/content.npy", "rejected.jsonl", "selection/default/subset.jsonl"):
        assert (replay / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_finished_run_is_not_made_again(finished, folder):
    paths = [finished / "scores.parquet", finished / "manifest.json", *(finished / "scores").iterdir()]
    before = {path: path.stat() for path in paths}
    done = run_program("run", *run_arguments(folder, "run", selection__fraction=0.3))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"probed {NUM_ROWS} rows by an earlier start: ")
    assert {path: path.stat() for path in paths} == before


def test_a_run_inside_the_folder_of_the_corpus(folder, monkeypatch):
    """As under `data.path: .` with the default output: what it writes is not read by its next start."""
    inside = folder / "inside"
    inside.mkdir()
    shutil.copy(folder / "corpus.jsonl", inside)
    monkeypatch.chdir(inside)
    options = {"data__path": ".", "data__cache_dir": inside / "cache", "probe__batch_tokens": 64}
    arguments = run_arguments(folder, "inside/run", **options, selection__fraction=0.3)
    done = run_program("run", *arguments)
    assert done.returncode == 0 and f"probed {NUM_ROWS} rows (" in done.stdout, done.stderr
    (inside / "run" / "manifest.json").unlink()
    for command in (["run", *arguments], ["select", "--selection.name", "again"], ["run", *arguments]):
        done = run_program(*command)
        assert done.returncode == 0, done.stderr
    first, again = (inside / "run" / "selection" / name / "subset.jsonl" for name in ("default", "again"))
    assert first.read_bytes() == again.read_bytes()
    refused = run_program("run", *arguments, "--output_dir", ".")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith(
        f"output_dir: {str(inside)!r} is the folder of data.path, all files of which are read; allowed: "
        "another folder, also one inside it"
    )


def test_what_decides_nothing_may_change_between_two_starts(finished, folder, tmp_path):
    (tmp_path / "moved").mkdir()
    for name in ("corpus.jsonl", "model"):
        source = folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "moved" / name)
    options = {
        "data__path": tmp_path / "moved" / "corpus.jsonl",
        "model__name_or_path": tmp_path / "moved" / "model",
        "data__cache_dir": tmp_path / "cache",
        "data__num_workers": 2,
        "probe__batch_tokens": 64,
        "probe__checkpoint_steps": 7,
        "selection__fraction": 0.3,
    }
    done = run_program("run", *run_arguments(folder, "run", **options))
    assert done.returncode == 0, done.stderr
    assert "by an earlier start" in done.stdout


def test_features_without_their_rows_and_rows_that_are_there_twice(finished, folder):
    """What a kill, and ranks that outlived the first, can leave."""
    arguments = run_arguments(folder, "torn", probe__mode="frozen")
    assert run_program("probe", *arguments).returncode == 0
    run = folder / "torn"
    whole = pq.read_table(run / "scores.parquet")
    (run / "manifest.json").unlink()
    (run / "scores.parquet").unlink()
    first, second = sorted((run / "scores").iterdir())[:2]
    first.unlink()
    assert second.name == f"shard-000001-000000-{NUM_ROWS - 16:06d}.parquet"
    pq.write_table(pq.read_table(second)[:5], second.with_name("shard-000001-000000-000005.parquet"))
    (run / "scores" / ".tmp-1-shard-000007-000000-000016.parquet").write_text("torn")
    done = run_program("probe", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"probe: {NUM_ROWS - 16} of {NUM_ROWS} rows are there already" in done.stderr
    assert pq.read_table(run / "scores.parquet").equals(whole)
    assert not list((run / "scores").glob(".tmp-*"))


def test_a_start_that_was_killed_while_it_removed_an_earlier_run(finished, folder):
    """Whatever of the earlier run is still there belongs to other numbers, and goes."""
    arguments = run_arguments(folder, "killed", probe__mode="frozen", probe__seed=1)
    assert run_program("probe", *arguments).returncode == 0
    started = read_json(folder / "killed" / "started.json")
    shutil.rmtree(folder / "killed")
    shutil.copytree(finished, folder / "killed")
    (folder / "killed" / "started.json").write_text(json.dumps({**started, "clearing": True}))
    done = run_program("probe", *arguments)
    assert done.returncode == 0, done.stderr
    assert set(pq.read_table(folder / "killed" / "scores.parquet")["step"].to_pylist()) == {-1}
    assert not (folder / "killed" / "selection").exists()
    assert "clearing" not in read_json(folder / "killed" / "started.json")


def test_another_run_in_its_place_is_refused(finished, folder):
    before = (finished / "scores.parquet").read_bytes()
    done = run_program("run", *run_arguments(folder, "run", data__max_length=40))
    assert_one_line(done.returncode, done.stderr, 2, "data.max_length was 48 and is 40")
    assert (finished / "scores.parquet").read_bytes() == before
    assert not (finished / ".lock").exists()


SELECT_ALONE = """
import sys
from grads_dist.cli import main
code = main(sys.argv[1:])
print(sorted({"deepspeed", "transformers", "accelerate", "datasets"} & set(sys.modules)))
raise SystemExit(code)
"""


def test_select_alone_needs_no_model(finished):
    arguments = ["--output_dir", str(finished), "--selection.name", "again", "--model.name_or_path", "/gone"]
    done = run_python("-c", SELECT_ALONE, "select", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    again, first = finished / "selection" / "again", finished / "selection" / "default"
    assert (again / "subset.jsonl").read_bytes() == (first / "subset.jsonl").read_bytes()
    assert pq.read_table(again / "selected.parquet").equals(pq.read_table(first / "selected.parquet"))


def test_two_ranks_with_zero3_from_a_yaml_file(folder, torchrun):
    import grads_dist.__main__ as entry

    config = {
        "model": {"name_or_path": str(folder / "model")},
        "data": {"path": str(folder / "corpus.jsonl"), "cache_dir": str(folder / "cache")},
        "probe": {"global_batch": 8, "targets": ["embedding", "lm_head", "layers"]},
        "selection": {"rows": 5},
        "deepspeed": str(write_stage(folder, 3)),
        "output_dir": str(folder / "two"),
    }
    (folder / "two.yaml").write_text(json.dumps(config), encoding="utf-8")
    done = torchrun(2, Path(entry.__file__), "run", "--config", str(folder / "two.yaml"))
    assert done.returncode == 0, done.stderr
    assert "selected 5 of 30 rows" in done.stdout
    assert pq.read_table(folder / "two" / "scores.parquet")["index"].to_pylist() == list(range(NUM_ROWS))
    assert len(pq.read_table(folder / "two" / "selection" / "default" / "selected.parquet")) == 5
    assert {path.name for path in (folder / "two" / "logs").iterdir()} == {
        f"{kind}-0000{rank}.{suffix}"
        for rank in (0, 1)
        for kind, suffix in (("rank", "log"), ("metrics", "jsonl"))
    }


def chat(*turns: tuple[str, str]) -> bytes:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}).encode()


MEGABYTE = "more " * 200_000
CHATS = {
    "good": chat(("user", "loss"), ("assistant", "more data")),
    "broken JSON": b'{"messages": [{"role": "user"',
    "missing column": b'{"question": "loss"}',
    "unknown role": chat(("wizard", "loss"), ("assistant", "more")),
    "no token that carries loss": chat(("user", "loss")),
    "answer beyond max_length": chat(("user", "loss " * 60), ("assistant", "more")),
    "answer cut at max_length": chat(("user", "loss"), ("assistant", "more " * 60)),
    "question of 1 MB": chat(("user", MEGABYTE), ("assistant", "more")),
    "answer of 1 MB": chat(("user", "loss"), ("assistant", MEGABYTE)),
    "emoji": chat(("user", "\U0001f600 \U0001f468‍\U0001f469‍\U0001f467"), ("assistant", "\U0001f680 data")),
    "raw emoji": chat(("user", "loss"), ("assistant", "ROCKET")).replace(b"ROCKET", "🚀".encode()),
    "NUL": chat(("user", "lo\0ss"), ("assistant", "mo\0re\0")),
    "no messages": b'{"messages": []}',
    "not UTF-8": b'{"messages": "\xff\xfe"}',
    "last good": chat(("user", "select"), ("assistant", "less data")),
}
USABLE_CHATS = {
    "good",
    "answer cut at max_length",
    "answer of 1 MB",
    "emoji",
    "raw emoji",
    "NUL",
    "last good",
}
REASONS = {
    "unknown role": "wizard",
    "missing column": "messages",
    "no token that carries loss": "no token carries loss",
    "answer beyond max_length": "max_length",
    "question of 1 MB": "max_length",
}


@pytest.fixture(scope="module")
def survived(folder: Path) -> Path:
    """The run directory of a run over chats with every kind of fault."""
    (folder / "faulty.jsonl").write_bytes(b"\n".join(CHATS.values()) + b"\n")
    arguments = run_arguments(folder, "faulty", selection__fraction=1.0, selection__keep_duplicates=True)
    done = run_program("run", *arguments, "--data.path", str(folder / "faulty.jsonl"))
    assert done.returncode == 0, done.stderr
    return folder / "faulty"


def test_each_row_is_in_the_table_once_or_rejected_once(survived):
    used = pq.read_table(survived / "scores.parquet")["index"].to_pylist()
    counts = Counter([*used, *rejected(survived)])
    assert counts == Counter(range(len(CHATS)))
    assert {name for i, name in enumerate(CHATS) if i in used} == USABLE_CHATS


def test_rejections_say_why(survived):
    reasons = rejected(survived)
    names = list(CHATS)
    assert all(reason and "\n" not in reason for reason in reasons.values())
    faults = [name for name, word in REASONS.items() if word not in reasons[names.index(name)]]
    assert not faults, reasons


def test_usable_rows_keep_finite_statistics_and_their_bytes(survived):
    table = pq.read_table(survived / "scores.parquet")
    assert set(table["status"].to_pylist()) == {"ok"}
    assert max(table["num_tokens"].to_pylist()) == MAX_LENGTH
    subset = (survived / "selection" / "default" / "subset.jsonl").read_bytes()
    assert subset == b"".join(line + b"\n" for name, line in CHATS.items() if name in USABLE_CHATS)


def test_tokenized_rows_with_faults(folder):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
        {"input_ids": [5, 100_000], "labels": [5, 100_000]},
        {"input_ids": [8, 9] * 40},
    ]
    write_jsonl(folder / "tokens.jsonl", rows)
    arguments = run_arguments(folder, "tokens", probe__mode="frozen", selection__fraction=1.0)
    done = run_program("run", *arguments, "--data.path", str(folder / "tokens.jsonl"))
    assert done.returncode == 0, done.stderr
    table = pq.read_table(folder / "tokens" / "scores.parquet")
    assert table["index"].to_pylist() == [0, 4]
    assert table["num_tokens"].to_pylist() == [3, MAX_LENGTH]
    assert set(rejected(folder / "tokens")) == {1, 2, 3}


def test_padding_token_outside_the_models_vocabulary(folder, tmp_path):
    """Users add a padding token to the tokenizer and leave the model as it is."""
    from transformers import AutoTokenizer

    make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = run_arguments(folder, "newpad", probe__mode="frozen", model__name_or_path=tmp_path / "model")
    done = run_program("probe", *arguments)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(folder / "newpad" / "scores.parquet")
    assert set(table["status"].to_pylist()) == {"ok"} and len(table) == NUM_ROWS


def assert_one_line(code: int, stderr: str, expected_code: int, word: str) -> None:
    """One line that names what is wrong, last on stderr, and no traceback."""
    errors = [line for line in stderr.splitlines() if "error:" in line or "Traceback" in line]
    assert code == expected_code, stderr
    assert len(errors) == 1 and errors[0].startswith("grads-dist: error: "), stderr
    assert stderr.splitlines()[-1] == errors[0]
    assert word in errors[0]


FATAL = {
    "empty file": (3, "no rows", {"data__path": "{folder}/empty.jsonl"}),
    "no usable row": (3, "none of the 1 rows", {"data__path": "{folder}/useless.jsonl"}),
    "column missing everywhere": (3, "found: 'question'", {"data__path": "{folder}/columns.jsonl"}),
    "missing corpus": (2, "data.path", {"data__path": "{folder}/gone.jsonl"}),
    "missing model": (2, "model.name_or_path", {"model__name_or_path": "{folder}/gone"}),
    "folder that is no model": (2, "model.name_or_path", {"model__name_or_path": "{folder}"}),
    "unwritable output": (2, "output_dir", {"output_dir": "{folder}/corpus.jsonl/run"}),
    "fraction 0": (2, "selection.fraction: 0", {"selection__fraction": 0}),
    "fraction 2": (2, "selection.fraction: 2", {"selection__fraction": 2}),
    "unknown target": (2, "probe.targets: 'heads'", {"probe__targets": '["heads"]'}),
    "pattern without a match": (2, "matches no parameter", {"probe__targets": '{"a": "nothing"}'}),
    "tied target of an untied model": (2, "share one weight", {"probe__targets": '["tied"]'}),
    "missing DeepSpeed file": (2, "deepspeed", {"deepspeed": "{folder}/gone.json"}),
}


def fatal_arguments(folder: Path, name: str) -> list[str]:
    write_jsonl(folder / "empty.jsonl", [])
    write_jsonl(folder / "columns.jsonl", [{"question": "loss"}])
    write_jsonl(folder / "useless.jsonl", [{"messages": [{"role": "user", "content": "loss"}]}])
    options = {key: str(value).replace("{folder}", str(folder)) for key, value in FATAL[name][2].items()}
    return ["run", *run_arguments(folder, name.replace(" ", "-"), **options)]


@pytest.mark.parametrize("name", FATAL)
def test_other_faults_end_with_one_line_and_the_exit_code(folder, name):
    code, word, _ = FATAL[name]
    done = run_program(*fatal_arguments(folder, name))
    assert_one_line(done.returncode, done.stderr, code, word)


@pytest.mark.parametrize("name", ["no usable row", "missing model", "unwritable output", "unknown target"])
def test_other_faults_end_every_rank(folder, bare_ranks, name):
    code, word, _ = FATAL[name]
    results = bare_ranks(2, [sys.executable, "-m", "grads_dist", *fatal_arguments(folder, name)])
    assert [result[0] for result in results] == [code, code]
    lines = [
        line for _, _, err in results for line in err.splitlines() if "error:" in line or "Trace" in line
    ]
    assert len(lines) == 1 and lines[0].startswith("grads-dist: error: ") and word in lines[0], results
