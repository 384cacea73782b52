"""A run whose ranks are killed ends, started again, with the table and the selection of an undisturbed one.

benchmarks/kill_test.py does this at random, many times; here are three kills at three moments.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def kill_test(monkeypatch):
    """The script as a module, with its neighbours importable as when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kill_test

    return kill_test


def test_kills_lose_nothing(tmp_path: Path, kill_test):
    case = kill_test.CASES[0]
    kill_test.make_workspace(tmp_path)
    reference = kill_test.run_references(tmp_path, (case,))[case.name]
    kills = [
        kill_test.Kill(2, torchrun=False, aim="probing", delay=0.2, victim="rank"),
        kill_test.Kill(2, torchrun=True, aim="merging", delay=0.0, victim="all"),
        kill_test.Kill(1, torchrun=False, aim="selecting", delay=0.0, victim="all"),
    ]
    cycle = kill_test.Cycle(tmp_path, case, "killed")
    lines = kill_test.run_cycle(cycle, reference, iter(kills), random.Random(1))
    text, good = kill_test.summarize(lines)
    assert good, text
    assert [bool(line.phase) for line in lines] == [True, True, True, False], text
    assert lines[-1].lost == lines[-1].doubled == 0
