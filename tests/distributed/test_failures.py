"""Too little memory, gradients that are not finite, and starts that do not belong to what is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from score_tables import faults_between, numels, read_features, read_scores
from workspace import launch, make_model, make_rows, run_arguments, run_program, write_jsonl, write_stage

WORKER = Path(__file__).with_name("resume_worker.py")
NUM_ROWS = 40
BOUND = 32 * float(np.finfo(np.float32).eps)
TRAINED_BOUND = 1e-5
"""Five steps of Adam on gradients summed in another order."""
SMALL = 64
"""Padded tokens that fit, of the 128 of a batch; no row has more."""
TINY = 30
"""Padded tokens that fit; some rows have more."""

FROZEN = {"probe__mode": "frozen"}
TRAIN = {"probe__learning_rate": 1e-4}


class Jobs:
    """The jobs of one launch of two ranks, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs: list[dict] = []

    def add(self, name: str, run: str, stage: int, options: dict, **how: object) -> None:
        options = {"deepspeed": write_stage(self.folder, stage), "probe__shard_rows": 8, **options}
        flags = ["--overwrite"] if how.pop("overwrite", False) else []
        arguments = ["probe", *flags, *run_arguments(self.folder, run, **options)]
        self._jobs.append({"arguments": arguments, "outcome": str(self.folder / f"{name}.json"), **how})

    def run(self) -> None:
        path = self.folder / "jobs.json"
        path.write_text(json.dumps(self._jobs), encoding="utf-8")
        launch(2, WORKER, str(path))

    def outcome(self, name: str) -> tuple[list[int], str]:
        """The exit codes of both ranks, and what rank 0 said."""
        outcomes = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return [outcome["code"] for outcome in outcomes], outcomes[0]["text"]

    def manifest(self, run: str) -> dict:
        return json.loads((self.folder / run / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = Jobs(tmp_path_factory.mktemp("failures"))
    make_model(jobs.folder / "model")
    make_model(jobs.folder / "other", rms_norm_eps=1e-4)
    write_jsonl(jobs.folder / "corpus.jsonl", make_rows(NUM_ROWS))
    write_jsonl(jobs.folder / "other.jsonl", make_rows(NUM_ROWS, seed=1))
    jobs.add("whole", "whole", 0, FROZEN)
    jobs.add("trained", "trained", 2, TRAIN)
    jobs.add("split", "split", 0, FROZEN, room=SMALL)
    sketches = {"probe__features": '["content", "gradient"]', "probe__gradient_dim": 16}
    jobs.add("late", "late", 0, {**FROZEN, **sketches}, fail_in_add=True)
    jobs.add("rejecting", "rejecting", 0, FROZEN, room=TINY)
    for name, stage, options in (("sharded", 3, FROZEN), ("train", 2, TRAIN)):
        jobs.add(f"{name}-1", name, stage, options, room=SMALL)
        jobs.add(f"{name}-2", name, stage, options, room=SMALL)
    jobs.add("alone", "alone", 2, {**TRAIN, "probe__batch_tokens": 1}, room=TINY)
    for stage in (0, 1, 2, 3):
        jobs.add(f"spoilt-{stage}", f"spoilt-{stage}", stage, TRAIN, spoil=[5])
    jobs.add("spoilt-bf16", "spoilt-bf16", 2, {**TRAIN, "model__dtype": "bfloat16"}, spoil=[5])
    jobs.add("stopped", "stopped", 2, TRAIN, stop_after=14)
    jobs.add("rate", "stopped", 2, {"probe__learning_rate": 2e-4})
    jobs.add("corpus", "stopped", 2, {**TRAIN, "data__path": jobs.folder / "other.jsonl"})
    jobs.add("model", "stopped", 2, {**TRAIN, "model__name_or_path": jobs.folder / "other"})
    jobs.add("file", "stopped", 1, TRAIN)
    jobs.add("anew-1", "anew", 2, TRAIN, stop_after=14)
    jobs.add("anew-2", "anew", 2, {"probe__learning_rate": 0}, overwrite=True)
    jobs.run()
    return jobs


def check_table(jobs: Jobs, run: str, truth: str, bound: float, rows: np.ndarray | None = None) -> None:
    found, expected = read_scores(jobs.folder / run), read_scores(jobs.folder / truth)
    if rows is not None:
        expected = expected.filter(np.isin(expected["index"].to_numpy(), rows))
    assert sorted(found["index"].to_pylist()) == sorted(expected["index"].to_pylist())
    faults = faults_between(found, expected, numels(jobs.folder / truth), bound)
    assert not faults, "\n".join(faults)


def test_a_batch_that_does_not_fit_is_split(jobs):
    assert jobs.outcome("split")[0] == [0, 0]
    check_table(jobs, "split", "whole", BOUND)
    np.testing.assert_allclose(
        read_features(jobs.folder / "split"), read_features(jobs.folder / "whole"), rtol=2.0**-10, atol=1e-6
    )


def test_memory_that_runs_out_late_adds_nothing_twice(jobs):
    assert jobs.outcome("late")[0] == [0, 0], jobs.outcome("late")
    check_table(jobs, "late", "whole", BOUND)
    assert len(np.load(jobs.folder / "late" / "features" / "gradient.npy")) == NUM_ROWS


def test_a_row_that_does_not_fit_alone_is_rejected_with_its_reason(jobs):
    assert jobs.outcome("rejecting")[0] == [0, 0]
    table = read_scores(jobs.folder / "whole")
    lengths = dict(zip(table["index"].to_pylist(), table["num_tokens"].to_pylist(), strict=True))
    too_long = sorted(index for index, length in lengths.items() if length > TINY)
    assert 0 < len(too_long) < NUM_ROWS
    lines = (jobs.folder / "rejecting" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [line["index"] for line in rejected] == too_long
    reasons = [f"out of memory: its {lengths[index]} tokens do not fit alone" for index in too_long]
    assert [line["reason"] for line in rejected] == reasons
    kept = np.setdiff1d(np.arange(NUM_ROWS), too_long)
    check_table(jobs, "rejecting", "whole", BOUND, rows=kept)
    features = np.load(jobs.folder / "rejecting" / "features" / "content.npy")
    whole = np.load(jobs.folder / "whole" / "features" / "content.npy")
    np.testing.assert_allclose(features, whole[kept], rtol=2.0**-9, atol=2.0**-9)


@pytest.mark.parametrize(
    ("name", "truth", "bound"), [("sharded", "whole", BOUND), ("train", "trained", TRAINED_BOUND)]
)
def test_where_passes_are_collective_the_next_start_has_smaller_batches(jobs, name, truth, bound):
    codes, text = jobs.outcome(f"{name}-1")
    assert codes == [4, 4]
    assert text.startswith("out of memory in a batch of rows ") and "\n" not in text
    assert text.endswith("it goes on with probe.batch_tokens 64 instead of 128")
    assert jobs.outcome(f"{name}-2")[0] == [0, 0], jobs.outcome(f"{name}-2")
    check_table(jobs, name, truth, bound)


def test_a_row_that_cannot_be_trained_on_alone_ends_the_run_for_good(jobs):
    codes, text = jobs.outcome("alone")
    assert codes == [1, 1]
    assert text.startswith("out of memory: row ") and "does not fit alone; lower data.max_length" in text


@pytest.mark.parametrize("name", ["spoilt-0", "spoilt-1", "spoilt-2", "spoilt-3", "spoilt-bf16"])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(jobs, name):
    assert jobs.outcome(name)[0] == [0, 0], jobs.outcome(name)
    manifest = jobs.manifest(name)
    assert manifest["plan"]["skipped_steps"] == 1
    assert manifest["nonfinite_rows"] == 1
    table = read_scores(jobs.folder / name)
    bad = [row["index"] for row in table.to_pylist() if row["status"] == "nonfinite"]
    assert bad == [5]
    # Whatever the step did to the weights would show in all rows after it.
    assert np.isfinite(table["lm_head.norm"].to_numpy()[table["index"].to_numpy() != 5]).all()


CHANGES = {
    "rate": "probe.learning_rate was 0.0001 and is 0.0002",
    "corpus": "data.path names another corpus",
    "model": "model.name_or_path names another model",
    "file": "zero_optimization.stage in the DeepSpeed file was 2 and is 1",
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_what_changed(jobs, name):
    codes, text = jobs.outcome(name)
    assert codes == [2, 2]
    assert text.startswith(f"output_dir: {str(jobs.folder / 'stopped')!r} holds another run: ")
    assert CHANGES[name] in text
    assert text.endswith("allowed: what it was, another folder, or --overwrite to start anew")


def test_overwrite_starts_anew(jobs):
    assert jobs.outcome("anew-1")[0] == [4, 4]
    assert jobs.outcome("anew-2")[0] == [0, 0]
    assert jobs.manifest("anew")["plan"]["optimizer_steps"] == 5
    assert read_scores(jobs.folder / "anew").num_rows == NUM_ROWS


def test_another_number_of_ranks_cannot_go_on_with_an_epoch(jobs):
    options = {"deepspeed": write_stage(jobs.folder, 2), "probe__shard_rows": 8, **TRAIN}
    done = run_program("probe", *run_arguments(jobs.folder, "stopped", **options))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("grads-dist: error: ranks: 1 are running, but the checkpoint after step ")
    assert line.endswith("is of 2; allowed: 2, or --overwrite to start anew")
