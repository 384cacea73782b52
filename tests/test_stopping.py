"""What signals do to a run. As a script, this file is a rank that gets them."""

import os
import signal
import sys
import time

import pytest

from grads_dist.errors import Interrupted
from grads_dist.runtime import stopping

GO_ON = "start the same command again to go on"


@pytest.fixture
def installed():
    stopping.install()
    yield
    stopping.uninstall()


def test_the_first_signal_raises(installed):
    with pytest.raises(Interrupted, match=f"interrupted by SIGTERM; {GO_ON}"):
        signal.raise_signal(signal.SIGTERM)
    assert stopping.requested() == "SIGTERM"


def test_inside_deferred_it_only_sets_the_flag(installed):
    with stopping.deferred():
        with stopping.deferred():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert stopping.requested() == "SIGUSR1"


def test_a_launcher_may_send_sigterm_with_the_sigint_of_the_terminal(installed):
    with stopping.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    # Later than any first signal: that one has been handled.
    signal.raise_signal(signal.SIGUSR1)
    assert stopping.requested() == "SIGTERM"


def test_a_request_of_another_rank_raises_nothing_and_the_next_signal_does(installed):
    stopping.request("SIGUSR1")
    stopping.request("SIGTERM")
    assert stopping.requested() == "SIGUSR1"
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        signal.raise_signal(signal.SIGTERM)


def test_uninstalling_gives_the_handlers_back():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    stopping.install()
    stopping.install()
    stopping.request("SIGTERM")
    stopping.uninstall()
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert stopping.requested() is None


def test_a_forked_child_that_is_ended_stops_nothing(installed):
    child = os.fork()
    if child == 0:
        time.sleep(100)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.2)
    assert stopping.requested() is None


def test_a_signal_of_one_rank_ends_all_after_the_deferred_section(bare_ranks, tmp_path):
    results = bare_ranks(2, [sys.executable, __file__, "one", str(tmp_path)])
    errors = "".join(err for _, _, err in results)
    assert [code for code, _, _ in results] == [4, 4], errors
    lines = [line for line in errors.splitlines() if line.startswith("grads-dist:")]
    assert lines == [f"grads-dist: error: interrupted by SIGTERM; {GO_ON}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole-0", "whole-1"]


def test_a_second_signal_ends_a_rank_inside_a_collective_at_once(bare_ranks, tmp_path):
    results = bare_ranks(2, [sys.executable, __file__, "twice", str(tmp_path)])
    errors = "".join(err for _, _, err in results)
    assert [code for code, _, _ in results] == [4, 0], errors
    assert list(tmp_path.iterdir()) == []


def _one(folder):
    """Both ranks work until all know of the signal that one got, and finish what they began."""
    import torch
    import torch.distributed as dist

    from grads_dist.runtime.launcher import detect
    from grads_dist.runtime.ranks import Ranks

    ranks = Ranks.start(detect())
    with ranks.working("the pass"):
        stop = False
        while not stop:
            ranks.beat("rows 1-2")
            if ranks.rank == 1 and stopping.requested() is None:
                os.kill(os.getpid(), signal.SIGTERM)
            (stop, never) = ranks.any_of(ranks.rank == 0 and ranks.stop_requested() is not None, False)
            assert not never
            dist.all_reduce(torch.ones(1))
        (folder / f"whole-{ranks.rank}").touch()
    ranks.meet()
    (folder / f"never-{ranks.rank}").touch()


def _twice(folder):
    """Rank 1 lets rank 0 wait in a collective, and signals it twice."""
    import torch
    import torch.distributed as dist

    from grads_dist.runtime.launcher import detect
    from grads_dist.runtime.ranks import Ranks

    ranks = Ranks.start(detect())
    other = ranks.gather(os.getpid())[0]
    if ranks.rank == 1:
        time.sleep(1)
        for _ in range(2):
            os.kill(other, signal.SIGTERM)
            time.sleep(1)
        try:
            os.kill(other, 0)
            state = open(f"/proc/{other}/stat").read().rpartition(")")[2].split()[0]
        except OSError:
            state = "Z"
        # Gone while this rank has not come to the collective.
        os._exit(0 if state in "ZX" else 7)
    with stopping.deferred():
        dist.all_reduce(torch.ones(1))
    (folder / "never").touch()


if __name__ == "__main__":
    from pathlib import Path

    from grads_dist import cli, commands

    work = {"one": _one, "twice": _twice}[sys.argv[1]]
    commands.COMMANDS["run"] = commands.Command("test", lambda args: lambda: work(Path(sys.argv[2])), True)
    sys.exit(cli.main(["run"]))
