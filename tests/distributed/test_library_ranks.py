"""`record` and the callback on two ranks: DDP, accelerate, DeepSpeed at ZeRO 0 to 3, both trainers."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from workspace import launch

WORKER = Path(__file__).with_name("library_worker.py")
CASES = [
    *("ddp", "ddp_adapters", "sharded", "accelerated", "one_rank_fails"),
    *("trainer", "trainer_rank_means", "trainer_recomputation", "sft"),
    *("zero0", "zero1", "zero2", "zero3", "zero3_tied"),
    *("trainer_zero2", "trainer_zero3", "sft_zero3", "trainer_zero2_bfloat16", "sft_zero3_bfloat16"),
]


@pytest.fixture(scope="module")
def passed(tmp_path_factory) -> set[str]:
    """Names of the cases that passed, all run in one launch; what failed is in the launch's own output."""
    folder = tmp_path_factory.mktemp("library")
    # The worker uses the tests' own models and oracle.
    with mock.patch.dict(os.environ, PYTHONPATH=str(WORKER.parent.parent)):
        launch(2, WORKER, str(folder))
    return {path.stem for path in folder.glob("*.passed")}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(passed, case):
    assert case in passed


def test_every_case_is_asked_for(passed):
    assert passed == set(CASES)
