"""Hostile input of every kind: no traceback, no hang, no lost row. `benchmarks/fuzz.py` tries far more."""

import pytest
from fuzzing import fuzz, kinds

EXAMPLES = {"jsonl": 60, "json": 60, "csv": 60, "table": 100, "config": 80, "flags": 150, "deepspeed": 200,
    "environment": 200, "select": 100}  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", EXAMPLES)
def test_hostile_input_ends_in_a_result_or_in_one_line(known, name):
    counts = fuzz(known[name], EXAMPLES[name])
    # Both ways were taken, or the cases would say nothing.
    assert counts["cases"] >= EXAMPLES[name]
    outcomes = ("kept", "files refused") if "rows" in counts else ("used", "refused")
    assert all(counts[outcome] for outcome in outcomes), counts


def test_every_kind_is_tried(known):
    assert set(known) == set(EXAMPLES)
