"""Training is training: reading statistics changes neither the losses nor the weights of the epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from score_tables import faults_between, numels, read_scores
from transformers import AutoModelForCausalLM
from workspace import launch, make_model, make_rows, make_tokenizer, run_arguments, write_jsonl, write_stage

WORKER = Path(__file__).with_name("train_worker.py")
NUM_ROWS, GLOBAL_BATCH, NUM_STEPS = 28, 8, 4
"""The last step has half the rows of the others."""
LEARNING_RATE, EPSILON = 1e-3, 1e-3
"""Adam divides by |g| + epsilon: a large one keeps small what rounding does to a gradient near 0."""

ROUNDING = float(np.finfo(np.float32).eps)
GRADIENT_ERROR = 32 * ROUNDING
"""Bound of test_invariance.py for two ways to compute a gradient, relative to its largest element."""
LARGEST_GRADIENT = 0.1
"""After clipping the norm, which is spread over thousands of elements, to 0.5."""
WEIGHT_BOUND = 2 * NUM_STEPS * (LEARNING_RATE * GRADIENT_ERROR * LARGEST_GRADIENT / EPSILON + ROUNDING / 2)
"""3.5e-6 after up to two epochs: each update errs by the gradient's error over epsilon, and is rounded into
weights of about 1. The weights move by up to 4e-3. Observed: up to 6e-8."""
LOSS_BOUND = 1e-5
"""Relative: its own rounding, and its gradient (norm below 2) times the error of the weights."""


@dataclass(frozen=True)
class Case:
    """One way to train: see train_worker.py."""

    way: str
    ranks: int
    stage: int
    options: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.way, f"{self.ranks}ranks", f"zero{self.stage}"]
        return "-".join(parts + [f"{k.rpartition('__')[2]}={v}" for k, v in self.options.items()])


TOKEN_MEAN = {"probe__objective": "token_mean"}
TWO_EPOCHS = {"probe__epochs": 2}
EVERYTHING = {"probe__warmup": 0.5}
REST = {"probe__warmup": 0.5, "probe__warmup_probe": "rest"}
OBJECTIVES = [{}, TOKEN_MEAN]
STAGES = [1, 2, 3]
CHECKPOINTED = [{"model__gradient_checkpointing": how} for how in ("nonreentrant", "reentrant")]

CASES = [
    *[Case("with", 2, stage) for stage in STAGES],
    *[Case("without", 2, stage, options) for stage in STAGES for options in OBJECTIVES],
    *[Case("deepspeed", 2, stage, options) for stage in STAGES for options in OBJECTIVES],
    *[Case("with", 2, stage, TOKEN_MEAN) for stage in STAGES],
    *[Case("with", 2, stage, options) for stage in (2, 3) for options in (EVERYTHING, REST)],
    Case("with", 2, 2, TWO_EPOCHS),
    *[Case("with", 2, stage, options) for stage in (1, 3) for options in CHECKPOINTED],
    *[Case("with", 1, stage, options) for stage in (0, 2) for options in OBJECTIVES],
    *[Case("torch", 1, 0, options) for options in (*OBJECTIVES, EVERYTHING, TWO_EPOCHS)],
]


class Trainings:
    """Runs the cases, all of one number of ranks in one launch, when one of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "model")
        write_jsonl(folder / "corpus.jsonl", make_rows(NUM_ROWS))
        self._launched: set[int] = set()

    def weights(self, case: Case) -> dict[str, np.ndarray]:
        """Final weights by name."""
        return {name: values for name, values in self._result(case).items() if name != "loss"}

    def losses(self, case: Case) -> np.ndarray:
        """Each row's loss when it was last trained on, in corpus order."""
        if case.way == "with":
            return pq.read_table(self.run(case) / "scores.parquet")["loss"].to_numpy()
        return self._result(case)["loss"]

    def run(self, case: Case) -> Path:
        """The run directory."""
        self._launch(case.ranks)
        return self.folder / case.name

    def frozen_at(self, case: Case) -> Path:
        """The run directory of a frozen probe of the final weights of a case."""
        model = AutoModelForCausalLM.from_pretrained(self.folder / "model")
        for name, parameter in model.named_parameters():
            parameter.data.copy_(parameter.data.new_tensor(self.weights(case)[name]))
        name = f"frozen-{case.name}"
        model.save_pretrained(self.folder / f"model-{name}")
        make_tokenizer().save_pretrained(self.folder / f"model-{name}")
        options = {"model__name_or_path": self.folder / f"model-{name}", "probe__mode": "frozen"}
        jobs = [{"arguments": run_arguments(self.folder, name, **options)}]
        launch(1, WORKER.with_name("probe_worker.py"), self._write_jobs(name, jobs))
        return self.folder / name

    def _result(self, case: Case) -> dict[str, np.ndarray]:
        self._launch(case.ranks)
        with np.load(self._output(case), allow_pickle=False) as arrays:
            return dict(arrays)

    def _output(self, case: Case) -> Path:
        return self.folder / f"{case.name}.npz"

    def _launch(self, ranks: int) -> None:
        if ranks in self._launched:
            return
        self._launched.add(ranks)
        jobs = [self._job(case) for case in CASES if case.ranks == ranks]
        jobs.sort(key=lambda job: job["way"] != "with")  # the others read the tokens that it wrote
        launch(ranks, WORKER, self._write_jobs(str(ranks), jobs))

    def _write_jobs(self, name: str, jobs: list[dict]) -> str:
        path = self.folder / f"jobs-{name}.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        return str(path)

    def _job(self, case: Case) -> dict:
        options = {
            "probe__mode": "train",
            "probe__global_batch": GLOBAL_BATCH,
            "probe__learning_rate": LEARNING_RATE,
            "probe__max_grad_norm": 0.5,
            "probe__targets": '["embedding", "lm_head", "layers"]',
            "deepspeed": write_stage(self.folder, case.stage, eps=EPSILON, betas="auto", weight_decay="auto"),
            **case.options,
        }
        arguments = run_arguments(self.folder, case.name, **options)
        return {"way": case.way, "arguments": arguments, "output": str(self._output(case))}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("training"))


def assert_same_training(trainings: Trainings, one: Case, other: Case) -> None:
    found, truth = trainings.weights(one), trainings.weights(other)
    assert found.keys() == truth.keys()
    errors = {name: np.abs(found[name] - truth[name]).max() for name in truth}
    faults = [f"{name}: {error:.2e}" for name, error in errors.items() if not error <= WEIGHT_BOUND]
    assert not faults, "\n".join(faults)
    np.testing.assert_allclose(trainings.losses(one), trainings.losses(other), rtol=LOSS_BOUND)


def objective_name(options: dict) -> str:
    return options.get("probe__objective", "sample_mean")


each_stage = pytest.mark.parametrize("stage", STAGES)
each_objective = pytest.mark.parametrize("options", OBJECTIVES, ids=objective_name)


@each_stage
@each_objective
def test_statistics_change_nothing(trainings, stage, options):
    assert_same_training(trainings, Case("with", 2, stage, options), Case("without", 2, stage, options))


@each_stage
@each_objective
def test_equals_deepspeed_around_the_plain_model(trainings, stage, options):
    assert_same_training(trainings, Case("with", 2, stage, options), Case("deepspeed", 2, stage, options))


@pytest.mark.parametrize("stage", [0, 2])
@each_objective
def test_equals_plain_torch_on_one_rank(trainings, stage, options):
    assert_same_training(trainings, Case("with", 1, stage, options), Case("torch", 1, 0, options))


@each_objective
def test_ranks_and_stages_do_not_matter(trainings, options):
    for stage in STAGES:
        assert_same_training(trainings, Case("with", 2, stage, options), Case("torch", 1, 0, options))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("options", CHECKPOINTED, ids=["nonreentrant", "reentrant"])
def test_gradient_checkpointing_does_not_matter(trainings, stage, options):
    assert_same_training(trainings, Case("with", 2, stage, options), Case("torch", 1, 0))


def test_two_epochs_equal_plain_torch_and_the_table_is_of_the_second(trainings):
    case = Case("with", 2, 2, TWO_EPOCHS)
    assert_same_training(trainings, case, Case("torch", 1, 0, TWO_EPOCHS))
    steps = read_scores(trainings.run(case))["step"].to_numpy()
    assert sorted(set(steps.tolist())) == [4, 5, 6, 7]


def test_the_weights_move_and_the_objectives_differ(trainings):
    """Else the comparisons would prove nothing."""
    initial = AutoModelForCausalLM.from_pretrained(trainings.folder / "model")
    sample_mean = trainings.weights(Case("torch", 1, 0))
    token_mean = trainings.weights(Case("torch", 1, 0, TOKEN_MEAN))
    for name, parameter in initial.named_parameters():
        assert np.abs(sample_mean[name] - parameter.detach().numpy()).max() > 10 * WEIGHT_BOUND, name
        assert np.abs(sample_mean[name] - token_mean[name]).max() > WEIGHT_BOUND, name


def test_step_is_the_one_that_a_row_was_trained_in(trainings):
    table = pq.read_table(trainings.run(Case("with", 2, 3)) / "scores.parquet")
    steps, counts = np.unique(table["step"].to_numpy(), return_counts=True)
    assert dict(zip(steps.tolist(), counts.tolist(), strict=True)) == {0: 8, 1: 8, 2: 8, 3: 4}


each_warmup = pytest.mark.parametrize("options", [EVERYTHING, REST], ids=["everything", "rest"])


@pytest.mark.parametrize("stage", [2, 3])
@each_warmup
def test_warmup_ends_training_after_its_share(trainings, stage, options):
    found = trainings.weights(Case("with", 2, stage, options))
    truth = trainings.weights(Case("torch", 1, 0, EVERYTHING))
    faults = [name for name in truth if not np.abs(found[name] - truth[name]).max() <= WEIGHT_BOUND]
    assert not faults


@pytest.mark.parametrize("stage", [2, 3])
def test_warmup_probes_everything_at_the_frozen_weights(trainings, stage):
    table = read_scores(trainings.run(Case("with", 2, stage, EVERYTHING)))
    assert table.num_rows == NUM_ROWS
    assert set(table["step"].to_pylist()) == {2}


@pytest.mark.parametrize("stage", [2, 3])
def test_warmup_probes_the_rest_at_the_frozen_weights(trainings, stage):
    table = read_scores(trainings.run(Case("with", 2, stage, REST)))
    steps, counts = np.unique(table["step"].to_numpy(), return_counts=True)
    assert dict(zip(steps.tolist(), counts.tolist(), strict=True)) == {0: 8, 1: 8, 2: 12}


def test_rows_seen_after_the_warmup_have_the_statistics_of_the_frozen_weights(trainings):
    everything, rest = (Case("with", 2, 3, options) for options in (EVERYTHING, REST))
    frozen = trainings.frozen_at(everything)
    truth = read_scores(frozen)
    found = read_scores(trainings.run(everything))
    assert not (faults := faults_between(found, truth, numels(frozen), GRADIENT_ERROR)), "\n".join(faults)
    late = read_scores(trainings.run(rest))
    late = late.filter(late["step"].to_numpy() == 2)
    same_rows = truth.filter(np.isin(truth["id"].to_pylist(), late["id"].to_pylist()))
    assert not (faults := faults_between(late, same_rows, numels(frozen), GRADIENT_ERROR)), "\n".join(faults)
