"""Runs of which one rank dies, hangs or fails alone. As a script, this file is a rank of such a run."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grads_dist.errors import ConfigError
from grads_dist.runtime.activity import FIRST_LIMIT, MIN_LIMIT, Activity, find_main
from grads_dist.runtime.verdict import Beat, Failure, judge

RANKS = 3
CULPRIT = 1


def _run(bare_ranks, folder, case, culprit=CULPRIT):
    results = bare_ranks(RANKS, [sys.executable, __file__, case, str(culprit), str(folder)])
    errors = "".join(err for _, _, err in results)
    lines = [line for line in errors.splitlines() if line.startswith("grads-dist: error:")]
    return [code for code, _, _ in results], lines, errors


@pytest.mark.parametrize("place", ["collective", "meet"])
def test_a_rank_that_is_killed_ends_the_run_and_is_named(bare_ranks, tmp_path, place):
    codes, lines, errors = _run(bare_ranks, tmp_path, f"killed {place}")
    assert codes == [1, -signal.SIGKILL, 1], errors
    assert len(lines) == 1, errors
    assert re.match(r"grads-dist: error: rank 1 \(host .+\), rows 8-11: gone: no sign of life", lines[0])
    assert "Connection closed" not in lines[0]


def test_the_rank_that_holds_the_store_is_killed(bare_ranks, tmp_path):
    codes, lines, errors = _run(bare_ranks, tmp_path, "killed collective", culprit=0)
    assert codes == [-signal.SIGKILL, 1, 1], errors
    assert len(lines) == 1, errors
    assert re.search(r"lost the connection to rank 0 \(.+\): it, or its node, is gone$", lines[0])


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_is_stopped_ends_the_run(bare_ranks, tmp_path, culprit):
    codes, lines, errors = _run(bare_ranks, tmp_path, "stopped collective", culprit)
    assert codes == [-signal.SIGKILL if rank == culprit else 1 for rank in range(RANKS)], errors
    assert len(lines) == 1 and f"rank {culprit} (" in lines[0], errors


@pytest.mark.parametrize("place", ["collective", "meet"])
def test_a_rank_that_hangs_is_named_with_its_rows_and_its_place(bare_ranks, tmp_path, place):
    codes, lines, errors = _run(bare_ranks, tmp_path, f"hangs {place}")
    assert codes == [1, 1, 1], errors
    assert len(lines) == 1, errors
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if text.endswith("# hangs here")
    )
    found = rf"rank 1 \(host .+\), rows 8-11: hung: no progress for \d+ s, at tests/test_watch.py:{line}$"
    assert re.search(found, lines[0]), errors


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("raises collective", 1, "RuntimeError: only here"),
        ("raises meet", 1, "RuntimeError: only here"),
        ("refuses collective", 2, "model: this rank has another one"),
    ],
)
def test_an_error_of_one_rank_ends_all_with_its_code(bare_ranks, tmp_path, case, code, message):
    codes, lines, errors = _run(bare_ranks, tmp_path, case)
    assert codes == [code] * RANKS, errors
    assert len(lines) == 1, errors
    assert re.match(rf"grads-dist: error: rank 1 \(host .+\), rows 8-11: {message}", lines[0])


@pytest.mark.parametrize("case", ["late meet", "long meet", "long collective"])
def test_a_run_that_ends_well_says_nothing(bare_ranks, tmp_path, case):
    """Though a rank is aside for longer than a hang takes, or its batch is much larger than any before, and
    ranks come to the end at different times."""
    codes, lines, errors = _run(bare_ranks, tmp_path, case)
    assert (codes, lines) == ([0] * RANKS, []), errors


def _beat(rank, **changes):
    own = {"rank": rank, "host": f"n{rank}", "number": 7, "state": "working", "doing": f"rows {rank}",
           "progress": 5, "stalled": 50.0, "limit": 40.0, "waiting": True, "where": "a.py:1"}  # fmt: skip
    return Beat(**own | changes)


def _at_fault(*beats):
    found = judge(beats)
    return None if found is None else found.rank


def test_the_rank_that_waits_for_nobody_is_at_fault():
    assert _at_fault(_beat(0), _beat(1, waiting=False), _beat(2)) == 1
    assert "rows 1" in judge([_beat(0), _beat(1, waiting=False)]).line()


def test_of_several_the_rank_that_has_done_least_is_at_fault():
    # On GPUs the main threads wait where no collective is seen.
    busy = [_beat(0, waiting=False), _beat(1, waiting=False, progress=4), _beat(2, waiting=False)]
    assert _at_fault(*busy) == 1


def test_a_rank_that_may_still_get_on_is_waited_for():
    assert _at_fault(_beat(0), _beat(1, waiting=False, limit=60.0)) is None
    assert _at_fault(_beat(0), _beat(1, state="paused", waiting=False)) is None
    assert _at_fault(_beat(0), _beat(1, state="elsewhere", waiting=False)) is None


def test_a_rank_that_may_wait_unseen_for_a_long_batch_is_no_culprit():
    """On a GPU rank 0 looks busy while it waits for rank 1, which has a long row."""
    long = {"waiting": False, "limit": 1800.0, "stalled": 49.0}
    assert _at_fault(_beat(0, waiting=False), _beat(1, **long)) is None
    # But not for one that gets on.
    assert _at_fault(_beat(0, waiting=False), _beat(1, **long | {"stalled": 3.0})) == 0
    assert _at_fault(_beat(0, waiting=False), _beat(1, **long | {"stalled": 1801.0}, progress=4)) == 1


def test_ranks_that_all_wait_are_hung():
    assert _at_fault(_beat(0), _beat(1, progress=4), _beat(2)) == 1
    assert _at_fault(_beat(0), _beat(1, stalled=3.0)) is None


def test_beats_and_failures_are_text_and_lines():
    assert Beat.load(_beat(3).dump()) == _beat(3)
    assert Failure(3, "n2", "rows 1-2", "bad", 1).line() == "rank 3 (host n2), rows 1-2: bad"
    assert Failure(3, "n2", "", "bad", 1).line() == "rank 3 (host n2): bad"
    assert Failure(3, "n2", "rows 1-2", "interrupted", 4, named=False).line() == "interrupted"


def test_an_error_that_only_sounds_like_a_broken_collective_is_reported_at_once():
    from grads_dist.runtime.ranks import is_broken_collective

    assert not is_broken_collective(RuntimeError("the model server: connection reset, timed out"))
    assert not is_broken_collective(ConnectionResetError("gloo"))


def test_nothing_is_collected_while_frames_are_looked_at():
    """Else another thread may end a frame just when it is looked at (see `_no_collection`)."""
    places: list[str] = []
    before = gc.get_threshold()

    def note(phase: str, _: object) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_name in ("_module", "_in_collective", "<genexpr>"):
            frame = frame.f_back
        places.append(frame.f_code.co_name)

    def look() -> None:
        # From here on every new object starts a collection.
        gc.set_threshold(1)
        gc.callbacks.append(note)
        try:
            find_main(threading.main_thread().ident, set())
        finally:
            gc.callbacks.remove(note)
            gc.set_threshold(*before)

    # In a thread, as the frames of the one that waits have no objects yet.
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert gc.isenabled() and places and "_find_main" not in places


class Clocked:
    """An activity in a pass, and a clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.activity = Activity()

    def step(self, seconds, cost=0.0, kind="batch"):
        """A step that takes so long; returns how long it might have taken."""
        self.activity.beat("rows", kind, cost)
        self.now += seconds
        return self.activity.limit()


@pytest.fixture
def clocked(monkeypatch):
    found = Clocked(monkeypatch)
    with found.activity.working("pass"):
        yield found


def test_the_limit_follows_the_longest_pause_of_a_kind(clocked):
    assert clocked.activity.limit() == FIRST_LIMIT
    assert clocked.step(20) == FIRST_LIMIT
    # On a GPU the first may still be under way.
    assert clocked.step(1) == FIRST_LIMIT
    assert clocked.step(1) == 100
    assert clocked.step(30, kind="update") == FIRST_LIMIT
    assert clocked.step(1) == FIRST_LIMIT
    assert clocked.step(1) == 100
    assert clocked.step(1, kind="update") == 150
    limits = [clocked.step(1) for _ in range(100)]
    assert limits[-1] == MIN_LIMIT


def test_a_batch_that_is_much_larger_than_any_before_has_the_time_of_a_first_one(clocked):
    for _ in range(100):
        ordinary = clocked.step(0.1, cost=1000)
    assert ordinary == MIN_LIMIT
    assert clocked.step(100, cost=1e6) == FIRST_LIMIT
    # On a GPU it is waited for while the next is under way.
    assert clocked.step(0.5, cost=1000) == FIRST_LIMIT
    limits = [clocked.step(0.5, cost=1000) for _ in range(100)]
    assert limits[0] == 5 * 100 and limits[-1] == MIN_LIMIT
    # Of one as large it is known how long it takes.
    assert clocked.step(100, cost=1e6) == 5 * 100
    assert clocked.step(0.5, cost=1000) == 5 * 100


def test_a_batch_that_is_larger_has_more_time_in_proportion(clocked):
    for _ in range(10):
        clocked.step(6, cost=1000)
    assert clocked.step(6, cost=1000) == MIN_LIMIT
    assert clocked.step(6, cost=4000) == 5 * 4 * 6
    for _ in range(3):
        clocked.step(6, cost=1000)
    # As slow as before, however much larger: more than half an hour.
    assert clocked.step(0, cost=1e6) == 5 * 250 * 6


def test_numbers_that_come_late_count_for_the_batch_that_they_are_of(clocked):
    """As on a GPU, where a pause is the time of the batch before."""
    for _ in range(10):
        clocked.step(0.5, cost=1000)
    for _ in range(2):
        assert clocked.step(0.5, cost=1e6) >= 300
        assert clocked.step(60, cost=1000, kind="step") >= 300
        for _ in range(100):
            ordinary = clocked.step(0.5, cost=1000)
        assert ordinary == MIN_LIMIT


def test_a_rehearsal_says_how_long_the_largest_takes(clocked):
    for cost in (4e6, 1e6):
        assert clocked.step(cost / 1e5, cost, kind="rehearsal") == FIRST_LIMIT
    for _ in range(100):
        clocked.step(0.5, cost=1000)
        ordinary = clocked.step(0.5, cost=1000, kind="step")
    assert ordinary == MIN_LIMIT
    assert clocked.step(30, cost=3e6, kind="step") == 5 * 40
    assert clocked.step(0.5, cost=1000) == 5 * 40


def test_what_stands_between_a_write_and_its_batch_is_a_pause(clocked):
    """Else batches after each of which something is written would seem to take no time."""
    for _ in range(3):
        clocked.step(20)
        with clocked.activity.aside("paused"):
            clocked.now += 1000
    assert clocked.step(0) == 100


def test_a_batch_is_announced_with_its_cost():
    from grads_dist.probe.batches import rehearsal_batch
    from grads_dist.probe.work import Work, batch_cost

    seen = []
    ranks = SimpleNamespace(beat=lambda *told: seen.append(told))
    work = Work(SimpleNamespace(ranks=ranks), store=None, config=None, scores=None, features=None)
    for shape in ((100, 40), (1, 64000)):
        work.beat(rehearsal_batch(*shape, 9, torch.device("cpu")), "step 3, ", "step")
    costs = [cost for _, _, cost in seen]
    assert [told[:2] for told in seen] == [("step 3, nothing, beside the other ranks", "step")] * 2
    assert costs == [batch_cost(100, 40), batch_cost(1, 64000)]
    # Sixteen times the tokens, and attention over all of them.
    assert costs[1] > 500 * costs[0]


def _case(what, place, alone):
    import torch.distributed as dist

    from grads_dist.runtime.launcher import detect
    from grads_dist.runtime.ranks import Ranks

    ranks = Ranks.start(detect())
    with ranks.working("the pass"):
        for step in range(4):
            large = what == "long" and step == 2 and ranks.rank == alone
            ranks.beat(f"rows {4 * step}-{4 * step + 3}", cost=1e6 if large else 1e3)
            if step == 2 and ranks.rank == alone:
                _misbehave(what, ranks)
            if place == "collective":
                dist.all_reduce(torch.ones(2))
    ranks.meet()


def _misbehave(what, ranks):
    if what == "killed":
        time.sleep(1)  # The others have seen what it does.
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stopped":
        # What is stopped cannot end by itself.
        command = f"sleep 14; kill -KILL {os.getpid()}"
        quiet = subprocess.DEVNULL
        subprocess.Popen(["sh", "-c", command], stdin=quiet, stdout=quiet, stderr=quiet)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "hangs":
        time.sleep(1000)  # hangs here
    elif what == "raises":
        raise RuntimeError("only here")
    elif what == "refuses":
        raise ConfigError("model: this rank has another one")
    elif what == "long":
        time.sleep(8)
    elif what == "late":
        with ranks.unwatched():
            time.sleep(6)


def _main(case, alone, folder):
    from grads_dist import cli, commands
    from grads_dist.runtime import activity, watch

    watch.INTERVAL, watch.PATIENCE, watch.PATIENCE_BROKEN, watch.ANSWER_WITHIN = 0.3, 4.0, 2.0, 4.0
    watch.LINGER = 2.0
    activity.MIN_LIMIT = 3.0
    what, place = case.split()
    action = commands.Command("test", lambda args: lambda: _case(what, place, int(alone)), True)
    commands.COMMANDS["run"] = action
    return cli.main(["run"])


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
