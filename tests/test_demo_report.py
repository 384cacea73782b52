"""The demo's report, from a run directory made of known numbers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.demo.assets import Assets
from grads_dist.demo.pretrain import PretrainResult
from grads_dist.demo.report import demo_report
from grads_dist.demo.results import choose_examples, epoch_losses, read_results
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.run import run_selection
from grads_dist.similarity.config import SimilarityConfig

NUM_ROWS = 60
COPY, REJECTED = 41, 59  # row 41 repeats row 40; row 59 was rejected while tokenizing
TWIN = 7  # close to row 6 in features, not a copy of it


@pytest.fixture
def finished(tmp_path: Path) -> tuple[RunDir, Assets]:
    corpus = tmp_path / "demo_assets" / "corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_text("".join(json.dumps(_row(i)) + "\n" for i in range(NUM_ROWS)), encoding="utf-8")
    run = RunDir(tmp_path / "demo")
    run.create(overwrite=False)
    config = Config(
        data=DataConfig(path=str(corpus), cache_dir=str(tmp_path / "cache")),
        similarity=SimilarityConfig(k=3, library="torch", device="cpu"),
        selection=SelectionConfig(fraction=0.1),
        output_dir=str(run.root),
    )
    save_config(config, run.config)
    run.manifest.write_text(json.dumps({"schema": 1, "targets": {"lm_head": {"numel": 100}}}))
    run.rejected.write_text(json.dumps({"index": REJECTED, "reason": "no token carries loss"}) + "\n")
    pq.write_table(_table(), run.scores)
    run.features("content").parent.mkdir()
    np.save(run.features("content"), _features())
    run_selection(config, run, Corpus.open(config.data))
    return run, Assets(
        corpus, tmp_path / "demo_assets" / "model", 1234, PretrainResult(3_344_064, 245_760, 8.3, 4.3)
    )


def _row(i: int) -> dict:
    question = "What does\n\n`f40()` do?" if i == COPY else f"What does\n\n`f{i}()` do?"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"Answer {i}. " + "x " * 80},
    ]
    return {"id": f"mod.f{i}", "messages": messages}


def _table() -> pa.Table:
    rng = np.random.default_rng(0)
    n = NUM_ROWS - 1
    hashes = np.arange(n)
    hashes[COPY] = hashes[40]
    labels = rng.integers(5, 50, n)
    norm = np.exp(rng.normal(size=n)) / labels
    return pa.table(
        {
            "index": pa.array(range(n), pa.int64()),
            "id": [f"mod.f{i}" for i in range(n)],
            "status": ["ok"] * n,
            "num_tokens": pa.array([100] * n, pa.int32()),
            "num_label_tokens": pa.array(np.where(np.arange(n) == COPY, labels[40], labels), pa.int32()),
            "loss": pa.array(np.linspace(5, 3, n), pa.float32()),
            "step": pa.array(np.arange(n) // 3, pa.int32()),
            "token_hash": hashes,
            "lm_head.sum": np.zeros(n),
            "lm_head.sumsq": norm**2,
            "lm_head.max": pa.array(norm / 2, pa.float32()),
            "lm_head.min": pa.array(-norm / 3, pa.float32()),
            "lm_head.mean": pa.array(np.zeros(n), pa.float32()),
            "lm_head.std": pa.array(norm / 10, pa.float32()),
            "lm_head.norm": pa.array(norm, pa.float32()),
        }
    )


def _features() -> np.ndarray:
    features = np.random.default_rng(1).normal(size=(NUM_ROWS - 1, 8))
    features[COPY] = features[40]
    features[TWIN] = features[6] + 1e-3
    return features.astype(np.float16)


def test_examples_are_the_rows_they_are_called(finished: tuple[RunDir, Assets]) -> None:
    selection = read_results(finished[0], finished[1].corpus).selection
    examples = choose_examples(selection, 3)
    assert selection.rank[examples["top"]].tolist() == [1, 2, 3]
    n = len(selection.rank)
    assert n == NUM_ROWS - 2
    assert selection.rank[examples["lowest"]].tolist() == [n, n - 1, n - 2]
    assert selection.rank[examples["median"]].tolist() == [28, 29, 30]
    shadowed = selection.index[examples["shadowed"][0]]
    assert {shadowed, selection.neighbour[examples["shadowed"][0]]} == {6, TWIN}
    assert (np.diff(selection.redundancy[examples["shadowed"]]) <= 0).all()


def test_no_more_examples_than_rows(finished: tuple[RunDir, Assets]) -> None:
    selection = read_results(finished[0], finished[1].corpus).selection
    examples = choose_examples(selection, 1000)
    assert [len(examples[kind]) for kind in ("top", "median", "lowest")] == [NUM_ROWS - 2] * 3
    assert len(examples["shadowed"]) == (selection.neighbour >= 0).sum() < NUM_ROWS - 2


def test_losses_are_those_of_the_first_and_last_steps() -> None:
    table = pa.table({"step": [19, 0, 1, 10, 18, 20], "loss": [2.0, 5.0, 7.0, 100.0, 3.0, 4.0]})
    assert epoch_losses(table) == (6.0, 3.0)


def test_report_says_what_was_done(finished: tuple[RunDir, Assets]) -> None:
    run, assets = finished
    report = demo_report(run, assets, 2, {"reading docstrings": 14.4, "running": 200.0})
    for text in (
        "60 rows from 1,234 docstrings, 5,900 tokens",
        "Llama with 3.3 M parameters, pretrained on 245,760 tokens of other docstrings, loss 8.30 -> 4.30",
        "one, 2 ranks, ZeRO-2, 20 steps, loss of the first and last tenth 4.91 -> 3.07",
        "6 of 58",
        "copies of an earlier row: 1, rejected: 1, with statistics that are not finite: 0",
        "reading docstrings  14",
        f"The run is in {run.root}, what it was made from in {assets.corpus.parent}.",
    ):
        assert text in report
    summary = json.loads((run.selection_dir("default") / "summary.json").read_text())
    assert f"R^2 = {summary['signal']['length_r2']:.2f}" in report
    assert f"random {summary['overlap']['random']:.0%}" in report
    covered, redundancy = summary["coverage"], summary["redundancy"]
    assert f"covered at 0.8     {covered['selected'][1]:.0%} of all rows" in report
    assert f"random: {covered['random'][1]:.0%}" in report
    assert f"{redundancy['all']['near_duplicates']:.0%} of all rows have one (cosine 0.95 or more)" in report
    assert f"that of {summary['vendi']['content']['selected']:.1f} rows without" in report
    assert max(map(len, report.splitlines()[:-1])) <= 120
    assert "What does `f" in report and "x x ...\n" in report


def test_report_shows_examples_in_order(finished: tuple[RunDir, Assets]) -> None:
    report = demo_report(*finished, 2, {"running": 1.0})
    titles = [report.index(title) for title in ("Top:", "Median:", "Shadowed:", "Lowest:")]
    assert titles == sorted(titles)
    assert report.count("      user       What does `f") == 12
    assert "  #1  mod.f" in report[titles[0] : titles[1]]
    shadowed = report[titles[2] : titles[3]]
    assert shadowed.count("shadowed by mod.f") == 3
    assert f"mod.f{TWIN}" in shadowed and "mod.f6" in shadowed
    assert f"mod.f{COPY}\n" not in report
