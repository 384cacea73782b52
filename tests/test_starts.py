"""How the ranks of one start tell their keys from those of an earlier one, in a store that stays."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from grads_dist import preparing
from grads_dist.runtime.rundir import RunDir, write_json
from grads_dist.runtime.starts import number_start

SOON = timedelta(seconds=20)


@pytest.fixture
def connect():
    """Makes connections to one store, which the fixture holds as an agent does."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def start(connect, ranks, world_size, patience=SOON):
    """Let some ranks of a start come; what each is told, or raises."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        coming = [pool.submit(number_start, connect(), rank, world_size, patience) for rank in ranks]
    return [found.exception() or found.result() for found in coming]


def test_all_ranks_of_a_start_agree_and_no_two_starts_have_the_same_keys(connect):
    starts = [start(connect, range(size), size) for size in (3, 3, 2)]
    assert all(len(set(told)) == 1 for told in starts)
    first, second, third = (told[0] for told in starts)
    assert len({first.keys, second.keys, third.keys}) == 3
    assert [told.again for told in (first, second, third)] == [False, True, True]
    assert first.launch == second.launch == third.launch
    other = dist.HashStore()
    assert number_start(other, 0, 1, SOON).launch != first.launch


@pytest.mark.parametrize("came", [[0], [1, 2], [0, 2]])
def test_a_start_of_which_not_all_ranks_came_disturbs_no_later_one(connect, came):
    cut = start(connect, came, 3, timedelta(seconds=0.3))
    whole = start(connect, range(3), 3)
    assert len(set(whole)) == 1
    # Rank 0 waits for all; a rank that heard of it knows no better.
    assert 0 not in came or isinstance(cut[came.index(0)], TimeoutError)
    assert whole[0] not in cut


def test_what_a_rank_0_said_that_is_gone_is_not_believed(connect):
    start(connect, range(2), 2)
    (late,) = start(connect, [1], 2, timedelta(seconds=0.3))
    assert isinstance(late, TimeoutError)


JOB, LAUNCH = {"job": "slurm job 7", "launch": None}, {"job": "slurm job 7", "launch": "a1"}


@pytest.mark.parametrize(
    ("before", "now", "queued_again", "restarted", "goes_on"),
    [
        ({"job": None, "launch": "a1"}, {"job": None, "launch": "a1"}, False, True, True),
        # The run of before this torchrun, which died before it had written its own.
        ({"job": None, "launch": "a0"}, {"job": None, "launch": "a1"}, False, True, False),
        ({"job": None}, {"job": None, "launch": "a1"}, False, True, False),
        ({"job": None, "launch": None}, {"job": None, "launch": None}, False, False, False),
        (LAUNCH, LAUNCH, False, True, True),
        # Another torchrun of the same batch script.
        ({**LAUNCH, "launch": "a0"}, LAUNCH, False, True, False),
        ({**LAUNCH, "launch": "a0"}, LAUNCH, True, False, True),
        (JOB, JOB, True, False, True),
        (JOB, {**JOB, "job": "slurm job 8"}, True, False, False),
    ],
)
def test_overwrite_means_what_was_there_before(
    tmp_path: Path, monkeypatch, before, now, queued_again, restarted, goes_on
):
    monkeypatch.setattr(preparing.launcher, "is_restarted", lambda: queued_again)
    rundir = RunDir(tmp_path)
    write_json(rundir.started, before)
    assert preparing._goes_on(rundir, now, True, restarted or queued_again) is goes_on
