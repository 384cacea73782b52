"""A run that is stopped and started again ends with the table of one that was not, and loses no row."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from score_tables import faults_between, numels, read_features, read_scores
from workspace import launch, make_model, make_rows, run_arguments, write_jsonl, write_stage

WORKER = Path(__file__).with_name("resume_worker.py")
NUM_ROWS = 60
BOUND = 32 * float(np.finfo(np.float32).eps)
"""As in test_invariance.py: batches of a run that goes on may be cut in other places."""


@dataclass(frozen=True)
class Case:
    """One run that is stopped after so many micro-batches of a rank, each time anew, until it is done."""

    name: str
    stage: int
    stops: tuple[int, ...]
    options: dict[str, object] = field(default_factory=dict)
    exact: bool = False
    """Whether the table must be equal in every bit."""


FROZEN = {"probe__mode": "frozen"}
WARM = {"probe__warmup": 0.5, "probe__features": '["content", "gradient"]', "probe__gradient_dim": 16}
CASES = [
    Case("frozen", 0, (1, 3, 2), FROZEN),
    Case("frozen-zero3", 3, (1, 4), FROZEN),
    Case("frozen-sketches", 0, (3, 2), {**FROZEN, **WARM, "probe__warmup": "null"}),
    Case("frozen-targets", 0, (9,), {**FROZEN, "data__target": "target.jsonl"}),
    *[Case(f"train-zero{stage}", stage, (3, 9, 1), exact=True) for stage in (0, 1, 2, 3)],
    Case("train-bfloat16", 2, (9, 3), {"model__dtype": "bfloat16"}, exact=True),
    Case("train-two-epochs", 2, (10, 12), {"probe__epochs": 2, "probe__checkpoint_steps": 3}, exact=True),
    Case("train-saved", 2, (8,), {"probe__save_model": True}, exact=True),
    Case("warm", 2, (9, 9, 9), WARM),
    Case("warm-rest", 3, (9, 9), {"probe__warmup": 0.5, "probe__warmup_probe": "rest"}),
]


class Runs:
    """All cases in one launch of two ranks, each beside the same run undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "model")
        rows = make_rows(NUM_ROWS)
        write_jsonl(folder / "corpus.jsonl", rows)
        write_jsonl(folder / "target.jsonl", make_rows(7, seed=1))
        jobs = []
        for case in CASES:
            jobs.append({"arguments": self.arguments(case, "whole")})
            for number, stop in enumerate((*case.stops, None)):
                outcome = str(folder / f"{case.name}-{number}.json")
                arguments = self.arguments(case, "resumed")
                jobs.append({"arguments": arguments, "stop_after": stop, "outcome": outcome})
        path = folder / "jobs.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        launch(2, WORKER, str(path))

    def arguments(self, case: Case, kind: str) -> list[str]:
        options = {"deepspeed": write_stage(self.folder, case.stage), "probe__shard_rows": 8, **case.options}
        if "data__target" in options:
            options["data__target"] = self.folder / str(options["data__target"])
        return ["probe", *run_arguments(self.folder, f"{case.name}-{kind}", **options)]

    def of(self, case: Case, kind: str) -> Path:
        return self.folder / f"{case.name}-{kind}"

    def outcomes(self, case: Case) -> list[list[dict]]:
        """What each rank said at each start."""
        starts = range(len(case.stops) + 1)
        return [json.loads((self.folder / f"{case.name}-{n}.json").read_text()) for n in starts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"))


of_each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@of_each
def test_every_start_but_the_last_is_stopped_on_all_ranks(runs, case):
    codes = [[outcome["code"] for outcome in start] for start in runs.outcomes(case)]
    assert codes == [[4, 4]] * len(case.stops) + [[0, 0]], runs.outcomes(case)
    stopped = runs.outcomes(case)[0][0]["text"]
    assert stopped == "interrupted by SIGTERM; start the same command again to go on"


@of_each
def test_the_table_is_that_of_an_undisturbed_run(runs, case):
    found, truth = (read_scores(runs.of(case, kind)) for kind in ("resumed", "whole"))
    assert sorted(found["index"].to_pylist()) == list(range(NUM_ROWS))
    if case.exact:
        assert found.equals(truth)
        return
    assert found["step"].to_pylist() == truth["step"].to_pylist()
    faults = faults_between(found, truth, numels(runs.of(case, "whole")), BOUND)
    assert not faults, "\n".join(faults)


@of_each
def test_features_too(runs, case):
    found, truth = (runs.of(case, kind) for kind in ("resumed", "whole"))
    np.testing.assert_allclose(read_features(found), read_features(truth), rtol=2.0**-10, atol=1e-6)
    names = sorted(path.name for path in (truth / "features").glob("*.npy"))
    assert names == sorted(path.name for path in (found / "features").glob("*.npy"))
    for name in names:
        one, other = (np.load(run / "features" / name) for run in (found, truth))
        np.testing.assert_allclose(one, other, rtol=2.0**-9, atol=2.0**-9)


@of_each
def test_a_stop_loses_no_work(runs, case):
    """Over all starts and ranks, every row was probed once."""
    rows = sum(outcome["rows"] for start in runs.outcomes(case) for outcome in start)
    assert rows == NUM_ROWS


def test_a_saved_model_is_that_of_an_undisturbed_run(runs):
    from safetensors.torch import load_file

    case = next(case for case in CASES if case.name == "train-saved")
    found, truth = (
        load_file(runs.of(case, kind) / "model" / "model.safetensors") for kind in ("resumed", "whole")
    )
    assert found.keys() == truth.keys()
    assert all((found[name] == truth[name]).all() for name in truth)


def test_checkpoints_are_gone_when_the_table_is_there(runs):
    for case in CASES:
        assert not (runs.of(case, "resumed") / "checkpoints").exists()
