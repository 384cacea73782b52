"""The score table does not depend on how it was made.

Not on batch, order, padding, accumulation, gradient checkpointing, number of ranks and ZeRO stage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from file_oracle import oracle_table
from scipy.stats import spearmanr
from score_tables import faults_between, numels, read_features, read_scores
from workspace import launch, make_model, make_rows, run_arguments, write_jsonl, write_stage

from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.select import select
from grads_dist.similarity.config import SimilarityConfig

WORKER = Path(__file__).with_name("probe_worker.py")
NUM_ROWS = 30
MAX_LENGTH = 48

BOUND = 32 * float(np.finfo(np.float32).eps)
"""3.8e-6, relative to `score_tables.scales`. A gradient comes out of about 30 float32 operations in a row
(two layers forward and backward, the head), each a sum in an order that depends on the batch's shape. Each
adds a rounding of up to eps/2, and two tables differ by that of both. Observed: up to 1.3e-6."""
FEATURE_BOUND = 2.0**-10
"""Features are stored as float16: values that are equal but for rounding may fall on neighbouring numbers."""

TARGETS = {
    "llama": ["embedding", "lm_head", "layers"],
    "gpt2": ["embedding", "lm_head", "tied", "layers"],
    "qwen2": ["embedding", "lm_head", "layers"],
    "gemma2": {"everything": ".*", "norms": r".*norm\.weight", "down": r".*down_proj\.weight"},
}


@dataclass(frozen=True)
class Case:
    """One way to make the table of `model`."""

    model: str
    ranks: int
    mode: str
    stage: int
    options: dict[str, object] = field(default_factory=dict)
    head_chunk_bytes: int | None = None

    @property
    def name(self) -> str:
        parts = [self.model, f"{self.ranks}ranks", self.mode, f"zero{self.stage}"]
        parts += [f"{key.rpartition('__')[2]}={value}" for key, value in self.options.items()]
        return "-".join([*parts, "smallchunk"] if self.head_chunk_bytes else parts).replace("/", "_")


def one_row_at_a_time(model: str) -> Case:
    return Case(model, 1, "frozen", 0, {"probe__batch_tokens": 1})


LARGE = {"probe__batch_tokens": 4096}
SHUFFLED = {"data__path": "shuffled.jsonl"}
NONREENTRANT = {"model__gradient_checkpointing": "nonreentrant"}
REENTRANT = {"model__gradient_checkpointing": "reentrant"}
MANY_MICRO_BATCHES = {"probe__batch_tokens": 1, "probe__global_batch": NUM_ROWS}
ONE_ROW_STEPS = {"probe__global_batch": 1}
FEW_MICRO_BATCHES = {"probe__batch_tokens": 4096, "probe__global_batch": 4}
ONE_UNIT = {"probe__shard_rows": NUM_ROWS}
CHUNK = 3 * 4 * 320
"""Logits of three positions."""

CASES = [
    Case("llama", 1, "frozen", 0, LARGE),
    Case("llama", 1, "frozen", 0, SHUFFLED),
    Case("llama", 1, "frozen", 3),
    *[Case("llama", 1, "train", stage) for stage in (0, 1, 2, 3)],
    Case("llama", 1, "train", 2, MANY_MICRO_BATCHES),
    Case("llama", 1, "train", 1, ONE_ROW_STEPS),
    Case("llama", 1, "frozen", 0, NONREENTRANT),
    Case("llama", 1, "frozen", 0, REENTRANT),
    Case("llama", 1, "train", 2, REENTRANT),
    Case("llama", 1, "train", 2, NONREENTRANT),
    Case("llama", 1, "frozen", 0, head_chunk_bytes=CHUNK),
    Case("llama", 1, "train", 3, head_chunk_bytes=CHUNK),
    Case("gpt2", 1, "frozen", 0, LARGE),
    Case("gpt2", 1, "train", 3, REENTRANT),
    Case("gpt2", 1, "frozen", 0, head_chunk_bytes=CHUNK),
    Case("gemma2", 1, "frozen", 0, LARGE),
    Case("gemma2", 1, "train", 0),
    Case("gemma2", 1, "train", 2, head_chunk_bytes=CHUNK),
    *[Case("llama", 2, "frozen", stage) for stage in (0, 1, 2, 3)],
    *[Case("llama", 2, "train", stage) for stage in (0, 1, 2, 3)],
    Case("llama", 2, "train", 3, SHUFFLED),
    Case("llama", 2, "train", 3, NONREENTRANT),
    Case("llama", 2, "train", 3, REENTRANT),
    Case("llama", 2, "frozen", 3, REENTRANT),
    Case("llama", 2, "train", 2, {"probe__objective": "token_mean"}),
    Case("gpt2", 2, "frozen", 3),
    *[Case("gpt2", 2, "train", stage) for stage in (1, 2, 3)],
    Case("gemma2", 2, "frozen", 3, NONREENTRANT),
    Case("gemma2", 2, "train", 3),
    Case("qwen2", 2, "train", 2),
    Case("llama", 3, "frozen", 0),
    Case("llama", 3, "frozen", 3, ONE_UNIT),
    Case("llama", 3, "train", 1),
    Case("llama", 3, "train", 2, MANY_MICRO_BATCHES),
    Case("llama", 3, "train", 3, FEW_MICRO_BATCHES),
    Case("gpt2", 3, "frozen", 3, FEW_MICRO_BATCHES),
    Case("gpt2", 3, "train", 2, FEW_MICRO_BATCHES),
    Case("gpt2", 3, "train", 3),
    Case("gemma2", 3, "train", 3, REENTRANT),
]
BFLOAT16 = {"model__dtype": "bfloat16"}
IN_BFLOAT16 = [
    Case("llama", 1, "frozen", 0, BFLOAT16),
    *[Case("llama", 2, mode, stage, BFLOAT16) for mode in ("frozen", "train") for stage in (1, 3)],
]
BASELINES = [one_row_at_a_time(model) for model in TARGETS]


class Runs:
    """Runs the cases, all of one number of ranks in one launch, when one of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for model in TARGETS:
            make_model(folder / model, model)
        rows = make_rows(NUM_ROWS)
        write_jsonl(folder / "corpus.jsonl", rows)
        order = np.random.default_rng(5).permutation(NUM_ROWS)
        write_jsonl(folder / "shuffled.jsonl", [rows[i] for i in order])
        self._launched: set[int] = set()

    def of(self, case: Case) -> Path:
        """The run directory of a case."""
        self._launch(case.ranks)
        return self.folder / case.name

    def whole_weights(self, case: Case) -> list[str]:
        """Weights that were whole on rank 0 after the probe although ZeRO-3 shards them."""
        self._launch(case.ranks)
        return json.loads((self.folder / f"{case.name}.whole.json").read_text(encoding="utf-8"))

    def _launch(self, ranks: int) -> None:
        if ranks in self._launched:
            return
        self._launched.add(ranks)
        jobs = [self._job(case) for case in BASELINES + CASES + IN_BFLOAT16 if case.ranks == ranks]
        path = self.folder / f"jobs-{ranks}.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        launch(ranks, WORKER, str(path))

    def _job(self, case: Case) -> dict:
        options = {
            "model__name_or_path": self.folder / case.model,
            "deepspeed": write_stage(self.folder, case.stage),
            "probe__mode": case.mode,
            "data__max_length": MAX_LENGTH,
            "probe__learning_rate": 0,
            "probe__targets": json.dumps(TARGETS[case.model]),
            **case.options,
        }
        if "data__path" in options:
            options["data__path"] = self.folder / str(options["data__path"])
        arguments = run_arguments(self.folder, case.name, **options)
        whole = self.folder / f"{case.name}.whole.json"
        return {
            "arguments": arguments,
            "head_chunk_bytes": case.head_chunk_bytes,
            "whole_weights": str(whole),
        }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("invariance"))


def of_each(*cases: Case):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@of_each(*CASES)
def test_same_table(runs, case):
    baseline = runs.of(one_row_at_a_time(case.model))
    found, truth = read_scores(runs.of(case)), read_scores(baseline)
    assert truth.num_rows == NUM_ROWS and set(truth["status"].to_pylist()) == {"ok"}
    faults = faults_between(found, truth, numels(baseline), BOUND)
    assert not faults, "\n".join(faults)


@of_each(*CASES)
def test_same_features(runs, case):
    found, truth = read_features(runs.of(case)), read_features(runs.of(one_row_at_a_time(case.model)))
    np.testing.assert_allclose(found, truth, rtol=FEATURE_BOUND, atol=1e-6)


@of_each(*CASES)
def test_same_selected_rows(runs, case):
    """Compared by content: of exact duplicates the first in the corpus stands for all, whatever its id."""
    assert selected(runs.of(case)) == selected(runs.of(one_row_at_a_time(case.model)))


def selected(run: Path) -> list[int]:
    table = pq.read_table(run / "scores.parquet")
    features = np.load(run / "features" / "content.npy")
    found = select(table, features, SelectionConfig(fraction=0.3), SimilarityConfig(k=3), list(numels(run)))
    hashes = table["token_hash"].to_numpy()[np.isin(table["index"].to_numpy(), found.selected_index)]
    return sorted(hashes.tolist())


ORACLE_CASES = [
    one_row_at_a_time("llama"),
    Case("llama", 2, "train", 3),
    one_row_at_a_time("gpt2"),
    Case("gpt2", 2, "train", 2),
    one_row_at_a_time("qwen2"),
    Case("qwen2", 2, "train", 2),
    one_row_at_a_time("gemma2"),
    Case("gemma2", 2, "train", 3),
]


@of_each(*ORACLE_CASES)
def test_table_equals_autograd_in_float64(runs, case):
    rows = make_rows(NUM_ROWS)
    truth, numel = oracle_table(runs.folder / case.model, case.model, rows, max_length=MAX_LENGTH)
    found = read_scores(runs.of(case))
    assert numel == numels(runs.of(case))
    faults = faults_between(found, truth, numel, BOUND)
    assert not faults, "\n".join(faults)


@of_each(*IN_BFLOAT16)
def test_bfloat16_ranks_the_rows_alike(runs, case):
    """Eight bits of mantissa are 0.4 % an operation; the norms of the rows spread over a factor of three."""
    found, truth = read_scores(runs.of(case)), read_scores(runs.of(one_row_at_a_time("llama")))
    for target in numels(runs.of(case)):
        correlation = spearmanr(found[f"{target}.norm"], truth[f"{target}.norm"]).statistic
        assert correlation > 0.97, target


def test_targets_differ_between_rows(runs):
    """Equal tables would prove nothing if all their rows were alike."""
    table = read_scores(runs.of(one_row_at_a_time("llama")))
    for target in ("embedding", "lm_head", "layers.0", "layers.1"):
        assert len(set(table[f"{target}.norm"].to_pylist())) >= 0.8 * NUM_ROWS


@of_each(*[case for case in CASES if case.mode == "train"][:1], one_row_at_a_time("llama"))
def test_step_is_minus_one_in_frozen_mode_only(runs, case):
    steps = set(read_scores(runs.of(case))["step"].to_pylist())
    assert steps == ({-1} if case.mode == "frozen" else {0, 1, 2, 3})


@of_each(*[case for case in CASES if case.stage == 3 and case.ranks > 1])
def test_zero3_leaves_no_weight_whole(runs, case):
    assert runs.whole_weights(case) == []
