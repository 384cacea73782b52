"""The selection as a whole: what it picks, what it writes, and what it does with odd input."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selection_tables import TARGETS, clustered_features, score_table, with_column

from grads_dist.config import Config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError, DataError
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.check import check_selection
from grads_dist.selection.config import Output, SelectionConfig, Weights
from grads_dist.selection.controls import CONTROLS, length_bins
from grads_dist.selection.ranks import r
from grads_dist.selection.run import run_selection
from grads_dist.selection.select import needed_columns, select
from grads_dist.similarity.config import SimilarityConfig

SIMILARITY = SimilarityConfig(device="cpu", library="torch")
NO_GRAPH = Weights(1.0, 0.0, 0.0)


def choose(table, features=None, similarity=SIMILARITY, targets=TARGETS, **options):
    return select(table, features, SelectionConfig(**options), similarity, targets)


# ---- what is picked


def test_the_score_is_the_weighted_sum_and_the_best_are_picked():
    table, features = score_table(300), clustered_features(300)
    weights = Weights(0.8, 0.3, 1.5)
    result = choose(table, features, weights=weights, fraction=0.2)
    expected = 0.8 * result.gradient + 0.3 * result.diversity - 1.5 * result.redundancy
    np.testing.assert_allclose(result.score, expected, atol=1e-12)
    assert result.selected.sum() == 60
    assert set(result.rank[result.selected]) == set(range(1, 61))
    assert result.score[result.selected].min() >= result.score[~result.selected].max()
    shadowed = result.redundancy > 0
    assert (result.neighbour[shadowed] >= 0).all() and (result.neighbour[~shadowed] == -1).all()
    assert (result.gradient[result.neighbour[shadowed]] >= result.gradient[shadowed]).all()


def test_a_weight_of_zero_is_the_ablation():
    table, features = score_table(200), clustered_features(200)
    full = choose(table, features)
    only_g = choose(table, features, weights=NO_GRAPH)
    np.testing.assert_array_equal(only_g.score, full.gradient)
    assert np.isnan(only_g.diversity).all() and only_g.summary["terms"]["tau"] is None
    without = choose(table, None, weights=NO_GRAPH)
    np.testing.assert_array_equal(only_g.selected_index, without.selected_index)
    only_d = choose(table, features, weights=Weights(0, 1, 0))
    np.testing.assert_allclose(only_d.score, full.diversity, atol=1e-12)


@pytest.mark.parametrize(
    "gradient", ["density", "magnitude", "density_magnitude", "flatten", "rare", "band", "zscore"]
)
def test_budgets_are_met_exactly_by_every_variant(gradient):
    table, features = score_table(230), clustered_features(230)
    assert choose(table, features, gradient=gradient, rows=31).selected.sum() == 31
    assert choose(table, features, gradient=gradient, fraction=0.1).selected.sum() == 23
    by_tokens = choose(table, features, gradient=gradient, tokens=5000)
    tokens = table.column("num_tokens").to_numpy()
    order = np.argsort(by_tokens.rank)
    if gradient == "zscore":
        order = order[by_tokens.gradient[order] == 1]
    count = by_tokens.selected.sum()
    assert tokens[by_tokens.selected].sum() <= 5000 < tokens[order[: count + 1]].sum()
    assert by_tokens.selected[order[:count]].all()


def test_zscore_needs_no_budget_and_controls_then_take_as_many():
    table = score_table(400)
    result = choose(table, gradient="zscore", zscore=1.0, weights=NO_GRAPH)
    inside = np.abs(result.signal - result.signal.mean()) <= result.signal.std()
    np.testing.assert_array_equal(result.selected, inside)
    assert result.summary["budget"]["limit"] is None
    control = choose(table, gradient="zscore", zscore=1.0, weights=NO_GRAPH, criterion="random")
    assert control.selected.sum() == inside.sum()
    assert (control.selected != inside).any()


def test_rows_outside_the_cut_are_not_picked_to_fill_a_budget(caplog):
    result = choose(score_table(400), gradient="zscore", zscore=0.5, rows=399, weights=NO_GRAPH)
    assert result.selected.sum() == (result.gradient == 1).sum() < 399
    assert "399 rows asked for" in caplog.text


def test_copies_collapse_to_the_first_and_can_be_kept():
    table = score_table(100)
    hashes, tokens = (
        table.column("token_hash").to_numpy().copy(),
        table.column("num_tokens").to_numpy().copy(),
    )
    hashes[[10, 20, 90]], tokens[[10, 20, 90]] = hashes[5], tokens[5]
    table = with_column(with_column(table, "token_hash", hashes), "num_tokens", tokens)
    features = clustered_features(100)
    result = choose(table, features, fraction=1.0)
    assert result.copies.tolist() == [10, 20, 90] and result.originals.tolist() == [5, 5, 5]
    assert result.selected_index.tolist() == [i for i in range(100) if i not in (10, 20, 90)]
    counts = result.summary["counts"]
    assert (counts["copies"], counts["sets_of_copies"], counts["candidates"]) == (3, 1, 97)
    kept = choose(table, features, fraction=1.0, keep_duplicates=True)
    assert kept.selected.sum() == 100 and kept.summary["counts"]["copies"] == 3


def test_a_fraction_is_of_all_scored_rows():
    table = with_column(score_table(100), "token_hash", np.arange(100) // 2)
    table = with_column(table, "num_tokens", np.full(100, 20))
    assert choose(table, weights=NO_GRAPH, fraction=0.3).selected.sum() == 30
    assert choose(table, weights=NO_GRAPH, fraction=0.9).selected.sum() == 50


def test_rows_that_are_not_finite_are_never_picked():
    table = score_table(60)
    bad = np.arange(60) % 3 == 0
    table = with_column(table, "status", np.where(bad, "nonfinite", "ok"))
    table = with_column(table, "loss", np.where(bad, np.nan, 1.0 + np.arange(60)))
    table = with_column(table, "embedding.max", np.where(bad, np.inf, table.column("embedding.max")))
    features = clustered_features(60)
    features[bad] = np.nan
    for criterion in ("grads", *CONTROLS):
        result = choose(table, features, rows=60, criterion=criterion)
        np.testing.assert_array_equal(result.selected_index, np.flatnonzero(~bad))
    assert result.summary["counts"]["nonfinite"] == 20


def test_near_duplicates_are_dropped_and_replaced():
    table, features = score_table(200), clustered_features(200)
    features[50:100] = features[50]
    result = choose(table, features, rows=100, dedup_threshold=0.99, weights=Weights(1, 0, 0))
    assert result.selected.sum() == 100
    assert result.selected[50:100].sum() <= 1
    assert result.summary["counts"]["allowed"] == 151
    best = 50 + np.argmin(result.rank[50:100])
    everything = choose(table, features, rows=200, dedup_threshold=0.99, weights=NO_GRAPH)
    assert everything.selected[50:100].nonzero()[0].tolist() == [best - 50]


def test_controls_pick_what_they_say():
    table, features = score_table(500), clustered_features(500)
    loss = table.column("loss").to_numpy()
    by_loss = choose(table, features, criterion="loss", rows=50)
    assert loss[by_loss.selected].min() >= loss[~by_loss.selected].max()
    assert np.isnan(by_loss.gradient).all() and (by_loss.neighbour == -1).all()
    grand = choose(table, features, criterion="grand", rows=50)
    norm = sum(table.column(f"{target}.sumsq").to_numpy() for target in TARGETS)
    assert norm[grand.selected].min() >= norm[~grand.selected].max()
    reference = choose(table, features, rows=50)
    matched = choose(table, features, criterion="length_matched_random", rows=50)
    bins = length_bins(table.column("num_label_tokens").to_numpy())
    np.testing.assert_array_equal(np.bincount(bins[matched.selected]), np.bincount(bins[reference.selected]))
    overlap = reference.summary["overlap"]
    assert overlap["length_matched_random"] == (matched.selected & reference.selected).sum() / 50
    assert overlap["grand"] == (grand.selected & reference.selected).sum() / 50
    assert overlap["expected_by_chance"] == pytest.approx(0.1)


# ---- same input, same selection


def without_seconds(summary):
    if not isinstance(summary, dict):
        return summary
    return {key: without_seconds(value) for key, value in summary.items() if key != "seconds"}


def test_the_same_arguments_give_the_same_selection():
    table, features = score_table(150), clustered_features(150)
    one, other = (choose(table, features, dedup_threshold=0.95, seed=3) for _ in range(2))
    for name in ("index", "score", "rank", "selected", "neighbour"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert without_seconds(one.summary) == without_seconds(other.summary)


@pytest.mark.parametrize("criterion", ["grads", "random", "length_matched_random"])
def test_the_order_of_the_table_does_not_matter(criterion):
    table, features = score_table(150), clustered_features(150)
    order = np.random.default_rng(0).permutation(150)
    straight = choose(table, features, criterion=criterion, fraction=0.3)
    shuffled = choose(table.take(order), features[order], criterion=criterion, fraction=0.3)
    np.testing.assert_array_equal(straight.selected_index, shuffled.selected_index)
    np.testing.assert_array_equal(straight.neighbour, shuffled.neighbour)
    np.testing.assert_allclose(straight.score, shuffled.score, atol=1e-9)


@pytest.mark.parametrize("gradient", ["density_magnitude", "density", "magnitude", "rare"])
def test_the_order_of_the_corpus_does_not_matter_but_for_ties(gradient):
    table, features = score_table(150), clustered_features(150)
    order = np.random.default_rng(0).permutation(150)
    moved = with_column(table.take(order), "index", np.arange(150))
    one = choose(table, features, gradient=gradient, fraction=0.3)
    other = choose(moved, features[order], gradient=gradient, fraction=0.3)
    scores = np.sort(one.score)[::-1]
    assert scores[44] > scores[45]
    ids = [set(x.selected_ids.to_pylist()) for x in (one, other)]
    assert ids[0] == ids[1] and len(ids[0]) == 45


EVERY_PICK = """
import zlib
from selection_tables import TARGETS, clustered_features, score_table
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.select import select
from grads_dist.similarity.config import SimilarityConfig
table, features = score_table(3000), clustered_features(3000, num_clusters=40)
features[100:200] = features[100]
for pick in ("topk", "mmr", "facility_location", "cluster", "gumbel"):
    options = SelectionConfig(pick=pick, rows=600, dedup_threshold=0.97)
    found = select(table, features, options, SimilarityConfig(device="cpu"), TARGETS)
    print(pick, zlib.crc32(found.selected.tobytes()), zlib.crc32(found.rank.tobytes()))
"""


def test_the_number_of_threads_does_not_matter():
    pytest.importorskip("faiss")
    outputs = []
    for threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", EVERY_PICK], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(run.stdout.splitlines())
    assert outputs[0] == outputs[1] and len(outputs[0]) == 5


def test_searching_with_faiss_or_torch_gives_the_same_selection():
    pytest.importorskip("torch")
    pytest.importorskip("faiss")
    table, features = score_table(300), clustered_features(300)
    features[30:80] = features[30]
    one, other = (
        choose(table, features, similarity=SimilarityConfig(library=index, device="cpu"))
        for index in ("faiss", "torch")
    )
    np.testing.assert_array_equal(one.selected_index, other.selected_index)
    np.testing.assert_array_equal(one.neighbour, other.neighbour)


# ---- odd input


@pytest.mark.parametrize("n", [1, 2, 3, 11])
@pytest.mark.parametrize("identical", [False, True])
def test_few_rows_and_identical_rows(n, identical):
    table, features = score_table(n), clustered_features(n)
    if identical:
        table = with_column(table.take(np.zeros(n, int)), "index", np.arange(n))
        table = with_column(table, "token_hash", np.arange(n))
        features[:] = features[0]
    for criterion in ("grads", *CONTROLS):
        result = choose(table, features, criterion=criterion, rows=2, dedup_threshold=None)
        assert result.selected.sum() == min(n, 2)
        assert np.isfinite(result.score).all()
        json.dumps(result.summary, allow_nan=False)
    if identical:
        assert choose(table, features, rows=2).selected_index.tolist() == list(range(min(n, 2)))
        # All are equal to the mean, so that no row is a neighbour of another.
        assert choose(table, features, rows=n, dedup_threshold=1.0).selected.all()


def test_one_row_scores_the_middle():
    result = choose(score_table(1), clustered_features(1))
    assert (result.gradient[0], result.diversity[0], result.redundancy[0]) == (0.5, 0.5, 0.0)
    assert result.selected_index.tolist() == [0] and result.rank.tolist() == [1]


def test_more_neighbours_than_rows():
    result = choose(score_table(12), clustered_features(12), similarity=SimilarityConfig(k=50, device="cpu"))
    np.testing.assert_array_equal(np.sort(result.diversity), r(np.arange(12)))
    assert np.isfinite(result.redundancy).all()


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_features_that_say_nothing(value):
    result = choose(score_table(40), np.full((40, 5), value, np.float16), rows=4)
    assert len(set(result.diversity)) == 1
    assert (result.redundancy == 0).all() and (result.neighbour == -1).all()


def test_a_constant_signal_leaves_the_choice_to_diversity():
    table, features = score_table(60), clustered_features(60)
    table = table.append_column("x", pa.array(np.full(60, 0.3)))
    result = choose(table, features, signal=["x"], rows=6, weights=Weights(1, 1, 0))
    assert len(set(result.gradient)) == 1
    assert result.diversity[result.selected].min() > np.quantile(result.diversity, 0.85)
    assert result.summary["signal"]["bandwidth_rule"] == "constant"


@pytest.mark.parametrize(
    ("options", "features", "error", "words"),
    [
        ({}, None, ConfigError, "selection.weights: d 0.5 and r 1.0 compare features"),
        ({"dedup_threshold": 0.9, "weights": NO_GRAPH}, None, ConfigError, "selection.dedup_threshold: 0.9"),
        ({}, np.zeros((7, 3), np.float16), DataError, r"features of shape \[7, 3\]"),
        ({"tokens": 3}, clustered_features(20), ConfigError, "selection.tokens: 3 is less than the"),
        ({"gradient": "zscore", "zscore": 1e-9}, clustered_features(20), ConfigError, "selection.zscore"),
        (
            {"gradient": "zscore", "zscore": 1e-9, "criterion": "random", "weights": NO_GRAPH},
            None,
            ConfigError,
            "selection.zscore: no row",
        ),
        ({"signal": ["nope"]}, clustered_features(20), ConfigError, "selection.signal: 'nope'"),
    ],
)
def test_what_cannot_be_selected_ends_in_one_line(options, features, error, words):
    with pytest.raises(error, match=words) as caught:
        choose(score_table(20), features, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_a_table_without_usable_rows_is_refused(num_rows):
    table = with_column(score_table(5), "status", ["nonfinite"] * 5).slice(0, num_rows)
    with pytest.raises(DataError, match=f"none of the {num_rows} rows"):
        choose(table, weights=NO_GRAPH)


def test_controls_do_not_need_features():
    for criterion in ("random", "loss", "grand"):
        assert choose(score_table(20), None, criterion=criterion, rows=4).selected.sum() == 4


def test_the_columns_it_says_it_needs_are_enough():
    table, features = score_table(50), clustered_features(50)
    for options in ({}, {"signal": "norm"}, {"signal": ["loss"]}, {"criterion": "grand"}, {"detrend": True}):
        pruned = table.select(needed_columns(SelectionConfig(**options), TARGETS))
        assert "embedding.nonfinite" not in pruned.column_names
        one, other = choose(table, features, **options), choose(pruned, features, **options)
        np.testing.assert_array_equal(one.selected_index, other.selected_index)


# ---- summary and files


def test_the_summary_says_what_happened(caplog):
    table, features = score_table(400), clustered_features(400)
    table = with_column(table, "lm_head.max", np.where(np.arange(400) < 3, 0.0, table.column("lm_head.max")))
    with caplog.at_level(logging.INFO):
        result = choose(table, features, fraction=0.25)
    summary = json.loads(json.dumps(result.summary, allow_nan=False))
    assert summary["counts"]["scored"] == summary["counts"]["candidates"] == 400
    assert summary["counts"]["selected"] == 100
    assert summary["budget"] == {
        "asked": {"fraction": 0.25, "rows": None, "tokens": None},
        "unit": "rows",
        "limit": 100,
    }
    assert summary["shares"]["rows"] == 0.25
    tokens = table.column("num_tokens").to_numpy()
    assert summary["shares"]["num_tokens"]["sum_selected"] == tokens[result.selected].sum()
    terms = summary["terms"]
    assert set(terms["spread"]) == {"G", "D", "R", "score"}
    assert terms["spread"]["D"]["mean"] == pytest.approx(result.diversity.mean())
    assert terms["spread_selected"]["score"]["min"] == result.score[result.selected].min()
    expected = np.corrcoef(result.gradient, result.redundancy)[0, 1]
    assert terms["correlation"]["G-R"] == pytest.approx(expected)
    assert terms["share_shadowed"] == (result.redundancy > 0).mean()
    signal = summary["signal"]
    assert signal["floored"] == {"lm_head.max": 3} and signal["zero_means"] == ["lm_head"]
    assert 0.3 < signal["length_r2"] < 1
    assert signal["rank_correlation"]["num_label_tokens"]["before"] < -0.5
    assert abs(signal["rank_correlation"]["num_label_tokens"]["after"]) < 0.15
    assert set(summary["overlap"]) == {"expected_by_chance", *CONTROLS}
    stages = {"candidates", "signal", "criterion", "neighbours", "score", "pick", "diagnostics", "content"}
    assert set(summary["seconds"]) == stages
    assert all(stage in caplog.text for stage in stages)


@pytest.fixture
def run(tmp_path):
    """A run directory of 60 rows out of a corpus of 80, of which every fourth was rejected."""
    corpus_path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"row {i} é"}, ensure_ascii=False) for i in range(80)]
    corpus_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rundir = RunDir(tmp_path / "run")
    (rundir.root / "features").mkdir(parents=True)
    table = with_column(score_table(60), "index", [i for i in range(80) if i % 4])
    pq.write_table(table, rundir.scores)
    np.save(rundir.features("content"), clustered_features(60))
    rundir.rejected.write_text("{}\n" * 20)
    rundir.manifest.write_text(json.dumps({"targets": {name: {"numel": 5000} for name in TARGETS}}))
    corpus = Corpus.open(DataConfig(path=str(corpus_path), cache_dir=str(tmp_path / "cache")))
    return SimpleNamespace(rundir=rundir, corpus=corpus, lines=lines, table=table)


def configure(similarity=SIMILARITY, **options):
    return Config(
        data=DataConfig(path="corpus.jsonl"), selection=SelectionConfig(**options), similarity=similarity
    )


def test_a_run_directory_gets_subset_table_and_summary(run):
    summary = run_selection(configure(rows=9, name="mine"), run.rundir, run.corpus)
    folder = run.rundir.root / "selection" / "mine"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "axolotl.yaml",
        "dataset_info.json",
        "selected.parquet",
        "subset.jsonl",
        "summary.json",
    ]
    table = pq.read_table(folder / "selected.parquet")
    assert table.column_names == ["index", "id", "score", "rank", "G", "D", "R", "neighbour"]
    index = table.column("index").to_pylist()
    assert len(index) == 9 and index == sorted(index) and all(i % 4 for i in index)
    assert (folder / "subset.jsonl").read_text(encoding="utf-8").splitlines() == [run.lines[i] for i in index]
    ids = dict(zip(run.table.column("index").to_pylist(), run.table.column("id").to_pylist(), strict=True))
    assert table.column("id").to_pylist() == [ids[i] for i in index]
    assert sorted(table.column("rank").to_pylist()) == list(range(1, 10))
    in_memory = select(run.table, clustered_features(60), SelectionConfig(rows=9), SIMILARITY, TARGETS)
    assert index == in_memory.selected_index.tolist()
    written = json.loads((folder / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    options = written["selection"]
    nested = {"weights": Weights(**options["weights"]), "output": Output(**options["output"])}
    assert SelectionConfig(**options | nested) == SelectionConfig(rows=9, name="mine")
    assert SimilarityConfig(**written["similarity"]) == SIMILARITY
    assert summary["subset"] == "subset.jsonl"
    assert (summary["counts"]["corpus"], summary["counts"]["rejected"]) == (80, 20)


def test_selecting_again_replaces_the_files(run):
    run_selection(configure(rows=9), run.rundir, run.corpus)
    run_selection(configure(rows=4, criterion="random"), run.rundir, run.corpus)
    folder = run.rundir.selection_dir("default")
    assert len((folder / "subset.jsonl").read_text().splitlines()) == 4
    assert pq.read_table(folder / "selected.parquet").num_rows == 4
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize(
    ("options", "removed", "words"),
    [
        ({}, "scores.parquet", "has no scores.parquet; probe first"),
        ({}, "manifest.json", "has no manifest.json; probe first"),
        ({}, "features/content.npy", "selection.weights: d 0.5"),
        (
            {"similarity": SimilarityConfig(features="other")},
            None,
            "similarity.features: 'other'.*allowed: content",
        ),
    ],
)
def test_an_incomplete_run_is_refused(run, options, removed, words):
    if removed:
        (run.rundir.root / removed).unlink()
    with pytest.raises(ConfigError, match=words):
        run_selection(configure(**options), run.rundir, run.corpus)
    assert not (run.rundir.root / "selection").exists()


def test_features_are_not_missed_when_no_term_needs_them(run):
    run.rundir.features("content").unlink()
    assert (
        run_selection(configure(rows=5, weights=NO_GRAPH), run.rundir, run.corpus)["counts"]["selected"] == 5
    )


NO_FEATURES = ProbeConfig(features="none")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"probe": NO_FEATURES}, "probe.features: none is not allowed"),
        (
            {"probe": NO_FEATURES, "selection": SelectionConfig(weights=NO_GRAPH, dedup_threshold=0.9)},
            "probe.features: none",
        ),
        (
            {"similarity": SimilarityConfig(features="other")},
            "similarity.features: 'other'.*allowed: content",
        ),
        ({"similarity": SimilarityConfig(device="cuda")}, "similarity.device: cuda is not available"),
        (
            {"selection": SelectionConfig(signal=["loss", "nope.max"])},
            "selection.signal: 'nope.max'.*allowed: index, .*embedding.max",
        ),
    ],
)
def test_what_would_stop_the_selection_is_found_before_the_probe(monkeypatch, sections, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=words):
        check_selection(Config(data=DataConfig(path="x"), **sections), TARGETS)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"probe": NO_FEATURES, "selection": SelectionConfig(weights=NO_GRAPH)},
        {"selection": SelectionConfig(signal=["loss", "embedding.max"])},
        {
            "selection": SelectionConfig(weights=NO_GRAPH),
            "similarity": SimilarityConfig(device="cuda", features="x"),
        },
    ],
)
def test_what_the_probe_will_write_is_enough_for_the_selection(monkeypatch, sections):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_selection(Config(data=DataConfig(path="x"), **sections), TARGETS)
