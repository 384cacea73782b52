"""Gradient features, target sets, checkpoints and saved models do not depend on how they were made."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from probe_worker import probe
from score_tables import faults_between, numels, read_scores
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import launch, make_model, make_rows, run_arguments, write_jsonl, write_stage

WORKER = Path(__file__).with_name("probe_worker.py")
NUM_ROWS, NUM_TARGETS = 20, 5
ROUNDING = 2.0**-10
"""Entries are float16: values that are equal but for rounding may fall on neighbouring numbers."""
BOUND = 2e-5
"""Of an entry of a vector of length 1. A sketch is a sum of float32 gradients, which differ by 1.3e-6 of
their norm between batches (test_invariance.py), times signs, so that errors add up as entries do."""
STATISTICS_BOUND = 32 * float(np.finfo(np.float32).eps)
TARGETS = {"llama": ["embedding", "lm_head", "layers"], "gpt2": ["tied", "layers"]}


@dataclass(frozen=True)
class Case:
    """One way to make the gradient features of `model`."""

    model: str
    ranks: int
    stage: int
    options: dict[str, object] = field(default_factory=dict)
    head_chunk_bytes: int | None = None

    @property
    def name(self) -> str:
        parts = [self.model, f"{self.ranks}ranks", f"zero{self.stage}"]
        short = {key: value for key, value in self.options.items() if key != "probe__targets"}
        parts += [f"{key.rpartition('__')[2]}={value}" for key, value in short.items()]
        return "-".join([*parts, "smallchunk"] if self.head_chunk_bytes else parts).replace("/", "_")


FROZEN = {"probe__mode": "frozen"}
WARMUP = {"probe__mode": "train", "probe__warmup": 0.5, "probe__learning_rate": 0}
ONE_ROW_BATCHES = {"probe__batch_tokens": 1}
LARGE = {"probe__batch_tokens": 4096}
CASES = [
    Case("llama", 1, 0, FROZEN | LARGE),
    Case("llama", 1, 0, FROZEN | {"model__gradient_checkpointing": "reentrant"}),
    Case("llama", 1, 0, FROZEN, head_chunk_bytes=3 * 4 * 320),
    Case("gpt2", 1, 0, FROZEN | LARGE),
    *[Case("llama", 2, stage, FROZEN) for stage in (0, 3)],
    Case("llama", 2, 1, WARMUP),
    Case("gpt2", 2, 2, WARMUP),
]
LEARNED = {
    "probe__mode": "train",
    "probe__warmup": 0.5,
    "probe__learning_rate": 3e-3,
    "probe__save_model": True,
    "probe__targets": '["embedding", "lm_head"]',
}
SAVED = [Case("llama", 2, stage, LEARNED) for stage in (0, 2, 3)]
CHECKPOINTS = [Case("llama", 1, 0, FROZEN | {"probe__checkpoints": "2"})]
CHECKPOINTS += [Case("llama", 2, 3, FROZEN | {"probe__checkpoints": "2"})]


def one_row_at_a_time(model: str) -> Case:
    return Case(model, 1, 0, FROZEN | ONE_ROW_BATCHES)


class Runs:
    """Runs the cases, all of one number of ranks in one launch, when one of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for model in TARGETS:
            make_model(folder / model, model)
        config = folder / "llama" / "config.json"
        with_dropout = config.read_text(encoding="utf-8").replace(
            '"attention_dropout": 0.0', '"attention_dropout": 0.1'
        )
        config.write_text(with_dropout, encoding="utf-8")
        other = AutoModelForCausalLM.from_pretrained(folder / "llama")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        other.save_pretrained(folder / "later")
        write_jsonl(folder / "corpus.jsonl", make_rows(NUM_ROWS))
        write_jsonl(folder / "target.jsonl", make_rows(NUM_TARGETS, seed=9))
        self._launched: set[int] = set()

    def of(self, case: Case) -> Path:
        """The run directory of a case; those of one rank need no launcher."""
        if case.ranks not in self._launched:
            self._launched.add(case.ranks)
            baselines = [one_row_at_a_time(model) for model in TARGETS]
            cases = [c for c in [*baselines, *CASES, *SAVED, *CHECKPOINTS] if c.ranks == case.ranks]
            jobs = [self._job(c.name, self._options(c), c.head_chunk_bytes) for c in cases]
            if case.ranks == 1:
                for job in jobs:
                    probe(**job)
            else:
                path = self.folder / f"jobs-{case.ranks}.json"
                path.write_text(json.dumps(jobs), encoding="utf-8")
                launch(case.ranks, WORKER, str(path))
        return self.folder / case.name

    def again(self, case: Case) -> Path:
        """The run directory of a frozen probe, on one rank, of the model that a case saved."""
        options = self._options(case) | {"model__name_or_path": self.of(case) / "model", **FROZEN}
        options |= {"probe__warmup": "null", "probe__save_model": False, "deepspeed": "null"}
        name = f"{case.name}-again"
        probe(**self._job(name, options, None))
        return self.folder / name

    def _options(self, case: Case) -> dict[str, object]:
        options = {
            "model__name_or_path": self.folder / case.model,
            "deepspeed": write_stage(self.folder, case.stage),
            "data__target": self.folder / "target.jsonl",
            "probe__targets": json.dumps(TARGETS[case.model]),
            "probe__features": '["gradient", "content"]',
            "probe__gradient_dim": 64,
            **case.options,
        }
        if "probe__checkpoints" in options:
            paths = [str(self.folder / "later"), str(self.folder / "llama")]
            options["probe__checkpoints"] = json.dumps(paths)
        return options

    def _job(self, name: str, options: dict, head_chunk_bytes: int | None) -> dict:
        arguments = run_arguments(self.folder, name, **options)
        return {"arguments": arguments, "head_chunk_bytes": head_chunk_bytes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("features"))


def of_each(*cases: Case):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def features(run: Path, name: str) -> np.ndarray:
    return np.load(run / "features" / f"{name}.npy", allow_pickle=False).astype(np.float64)


def assert_same(found: np.ndarray, truth: np.ndarray) -> None:
    assert found.shape == truth.shape
    np.testing.assert_allclose(found, truth, rtol=ROUNDING, atol=BOUND)


@of_each(*CASES)
def test_same_gradient_features(runs, case):
    run, truth = runs.of(case), runs.of(one_row_at_a_time(case.model))
    for name, rows in (("gradient", NUM_ROWS), ("gradient.target", NUM_TARGETS)):
        found = features(run, name)
        assert found.shape == (rows, 64)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
        assert_same(found, features(truth, name))


@of_each(*CASES)
def test_same_content_features_of_the_target_set(runs, case):
    run, truth = runs.of(case), runs.of(one_row_at_a_time(case.model))
    np.testing.assert_allclose(
        features(run, "content.target"), features(truth, "content.target"), rtol=ROUNDING, atol=1e-6
    )


def test_features_differ_between_rows(runs):
    vectors = features(runs.of(one_row_at_a_time("llama")), "gradient")
    cosines = vectors @ vectors.T
    assert np.median(cosines[np.triu_indices(NUM_ROWS, 1)]) < 0.8


@of_each(*SAVED)
def test_saved_model_is_the_one_that_was_probed(runs, case):
    run, again = runs.of(case), runs.again(case)
    for name in ("gradient", "gradient.target"):
        assert_same(features(run, name), features(again, name))
    found, truth = read_scores(run), read_scores(again)
    faults = faults_between(found, truth, numels(run), STATISTICS_BOUND)
    assert not faults, "\n".join(faults)
    assert set(found["step"].to_pylist()) == {2}


@of_each(*SAVED)
def test_saved_model_was_trained_and_keeps_its_configuration(runs, case):
    folder, base = runs.of(case) / "model", runs.folder / "llama"
    saved, original = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, base))
    moved = [
        (p - q).abs().max().item() for p, q in zip(saved.parameters(), original.parameters(), strict=True)
    ]
    assert 1e-4 < max(moved) < 0.1
    assert saved.config.attention_dropout == 0.1
    assert AutoTokenizer.from_pretrained(folder).chat_template
    one = AutoModelForCausalLM.from_pretrained(runs.of(SAVED[0]) / "model")
    for p, q in zip(saved.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=3e-4)


@of_each(*CHECKPOINTS)
def test_each_checkpoint_is_as_if_probed_alone(runs, case):
    run, alone = runs.of(case), runs.of(one_row_at_a_time("llama"))
    table = pq.read_table(run / "scores.parquet")
    assert table["index"].to_pylist() == sorted([*range(NUM_ROWS)] * 2)
    assert table["checkpoint"].to_pylist() == [0, 1] * NUM_ROWS
    second = table.filter(np.array([0, 1] * NUM_ROWS) == 1).sort_by("id")
    faults = faults_between(second, read_scores(alone), numels(alone), STATISTICS_BOUND)
    assert not faults, "\n".join(faults)
    for suffix in ("", ".target"):
        assert_same(features(run, f"gradient.1{suffix}"), features(alone, f"gradient{suffix}"))
        difference = features(run, f"gradient.0{suffix}") - features(alone, f"gradient{suffix}")
        assert np.abs(difference).max() > 0.05
    assert not np.array_equal(features(run, "content"), features(alone, "content"))
