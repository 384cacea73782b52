"""A run whose ranks are killed ends, started again, with the table and the selection of an undisturbed one.

benchmarks/kill_test.py does this at random, many times; here are three kills at three moments.
"""

from __future__ import annotations

import json
import random
import shutil

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def kill_test():
    """The script as a module, with its neighbours importable as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import kill_test

        yield kill_test


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, kill_test):
    """The cycle of a run that was killed three times, what came of each start, and the undisturbed run."""
    folder, case = tmp_path_factory.mktemp("kill"), kill_test.CASES[0]
    kill_test.make_workspace(folder)
    reference = kill_test.run_references(folder, (case,))[case.name]
    kills = [
        kill_test.Kill(2, torchrun=False, aim="probing", delay=0.2, victim="rank"),
        kill_test.Kill(2, torchrun=True, aim="merging", delay=0.0, victim="all"),
        kill_test.Kill(1, torchrun=False, aim="selecting", delay=0.0, victim="all"),
    ]
    cycle = kill_test.Cycle(folder, case, "killed")
    return cycle, kill_test.run_cycle(cycle, reference, iter(kills), random.Random(1)), reference


def test_kills_lose_nothing(killed, kill_test):
    _, lines, _ = killed
    text, good = kill_test.summarize(lines)
    assert good, text
    assert [bool(line.phase) for line in lines] == [True, True, True, False], text
    assert lines[-1].lost == lines[-1].doubled == 0


def test_the_check_sees_what_would_be_wrong(killed, tmp_path):
    from kill_cycle import NUM_ROWS, check_run

    cycle, _, reference = killed
    spoilt = shutil.copytree(cycle.run, tmp_path / "spoilt")
    table = pq.read_table(spoilt / "scores.parquet")
    column = table.column_names.index("loss")
    louder = table.set_column(column, table.field(column), [table["loss"].to_numpy() * 1.001])
    pq.write_table(louder, spoilt / "scores.parquet")
    (spoilt / ".tmp-1-scores.parquet").touch()
    found = check_run(spoilt, reference, NUM_ROWS)
    assert (found.lost, found.doubled, found.good) == (0, 0, False)
    assert any(fault.startswith("loss of") for fault in found.faults)
    assert any("left over" in fault for fault in found.faults)

    pq.write_table(table.slice(1), spoilt / "scores.parquet")
    with (spoilt / "rejected.jsonl").open("a") as file:
        file.write(json.dumps({"index": table["index"][5].as_py(), "reason": "none"}) + "\n")
    found = check_run(spoilt, reference, NUM_ROWS)
    assert (found.lost, found.doubled) == (1, 1)
