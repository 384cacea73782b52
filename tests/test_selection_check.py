"""What would stop a selection is found before the probe."""

import json

import pytest
from selection_tables import TARGETS

from grads_dist.config import Config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError
from grads_dist.probe.config import ProbeConfig
from grads_dist.selection.check import check_selection, check_strata
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.faiss_index import is_installed

NO_GRAPH = Weights(1, 0, 0)
NO_FEATURES = ProbeConfig(features="none")
BOTH = ProbeConfig(mode="frozen", features=["content", "gradient"])


def configure(**sections):
    return Config(data=DataConfig(path="x"), **sections)


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({}, "because selection.weights d or r compares features"),
        ({"weights": NO_GRAPH, "pick": "cluster"}, "because selection.pick: cluster compares features"),
        (
            {"weights": NO_GRAPH, "dedup_threshold": 0.9},
            "because selection.dedup_threshold compares features",
        ),
    ],
)
def test_features_that_no_probe_writes(selection, words):
    with pytest.raises(ConfigError, match=f"^probe.features: none is not allowed, {words}; allowed: content"):
        check_selection(configure(probe=NO_FEATURES, selection=SelectionConfig(**selection)), TARGETS)


@pytest.mark.parametrize("selection", [{"weights": NO_GRAPH}, {"weights": NO_GRAPH, "pick": "gumbel"}])
def test_picks_that_need_no_features(selection):
    check_selection(configure(probe=NO_FEATURES, selection=SelectionConfig(**selection)), TARGETS)


def test_a_density_over_targets_needs_two():
    selection = SelectionConfig(density_over="targets")
    check_selection(configure(selection=selection), TARGETS)
    with pytest.raises(ConfigError, match=r"^selection.density_over: targets needs two targets, .* has 1"):
        check_selection(configure(selection=selection), TARGETS[:1])
    with pytest.raises(ConfigError, match=r"^selection.density_over: targets needs two targets, .* has 4"):
        probe = ProbeConfig(mode="frozen", checkpoints=["a", "b"])
        check_selection(configure(selection=selection, probe=probe), TARGETS)


@pytest.mark.skipif(not is_installed(), reason="faiss is not installed")
@pytest.mark.parametrize(
    ("index", "features", "hidden_size", "works"),
    [
        ("IVF16,SQfp16", "content", 192, True),
        ("IVF16,Nonsense", "content", 192, False),
        ("PQ7", "content", 256, False),  # 7 does not divide the width
        ("PQ7", "content", 70, True),
        ("PQ8", "gradient", 70, True),
        ("PQ7", "gradient", 70, False),
    ],
)
def test_an_index_that_faiss_cannot_make(index, features, hidden_size, works):
    similarity = SimilarityConfig(index=index, features=features, device="cpu")
    config = configure(similarity=similarity, probe=BOTH)
    if works:
        check_selection(config, TARGETS, hidden_size)
        return
    with pytest.raises(ConfigError, match=f"^similarity.index: '{index}'") as error:
        check_selection(config, TARGETS, hidden_size)
    assert "\n" not in str(error.value)


def test_an_index_needs_faiss():
    similarity = SimilarityConfig(index="IVF16,Flat", library="torch", device="cpu")
    with pytest.raises(ConfigError, match="^similarity.index: 'IVF16,Flat' needs faiss"):
        check_selection(configure(similarity=similarity), TARGETS)
    check_selection(configure(similarity=similarity, selection=SelectionConfig(weights=NO_GRAPH)), TARGETS)


def test_strata_are_a_column_of_table_or_corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "x", "topic": "a"}) + "\n", encoding="utf-8")
    corpus = Corpus.open(DataConfig(path=str(path), cache_dir=str(tmp_path / "cache")))
    for column in (None, "topic", "step", "lm_head.nonfinite"):
        check_strata(configure(selection=SelectionConfig(stratify_by=column)), corpus)
    with pytest.raises(ConfigError, match="^selection.stratify_by: 'subject' .* allowed: text, topic$"):
        check_strata(configure(selection=SelectionConfig(stratify_by="subject")), corpus)
