"""A whole run gives the same table with the kernels and without."""

from __future__ import annotations

import pytest
from score_tables import faults_between, numels, read_scores
from workspace import make_model, make_rows, run_arguments, write_jsonl

from grads_dist.commands import prepare
from grads_dist.stats import backend, native

BOUND = 3.8e-6
"""That of tests/distributed/test_invariance.py."""


@pytest.mark.skipif(not native.variants(), reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_same_table_with_and_without_kernels(tmp_path, monkeypatch, architecture, mode):
    make_model(tmp_path / "model", architecture)
    write_jsonl(tmp_path / "corpus.jsonl", make_rows(24))
    for name in ("cpu", "reference"):
        monkeypatch.setenv(backend.VARIABLE, name)
        options = {
            "model__name_or_path": tmp_path / "model",
            "probe__mode": mode,
            "probe__targets": '["embedding", "lm_head", "layers", "norms"]',
            "probe__learning_rate": 0,
        }
        prepare(["probe", *run_arguments(tmp_path, name, **options)])()
    found, truth = (read_scores(tmp_path / name) for name in ("cpu", "reference"))
    faults = faults_between(found, truth, numels(tmp_path / "cpu"), BOUND)
    assert not faults, "\n".join(faults)
    assert not found.equals(truth)  # else one of them was not used
