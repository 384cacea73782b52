"""The ranks of a run: their process group, and the few ways in which they agree."""

import contextlib
import datetime
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist

from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.runtime import launcher, starts, stopping, watch
from grads_dist.runtime.activity import Activity
from grads_dist.runtime.launcher import Placement
from grads_dist.runtime.lock import boot_id
from grads_dist.runtime.starts import Start
from grads_dist.runtime.watch import Monitor

T = TypeVar("T")
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
AGENT_ANSWERS_WITHIN = datetime.timedelta(seconds=10)  # and once more, as torch tries twice
LONGEST_PAUSE = 0.5  # seconds
REPORT_TIMEOUT = datetime.timedelta(seconds=10)

# What gloo, NCCL and sockets say of a peer that has gone.
_BROKEN = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|timed? ?out|broken pipe", re.IGNORECASE
)
_COLLECTIVE_FILES = ("torch/distributed/", "deepspeed/comm/")

_started: "Ranks | None" = None


class Gpu(NamedTuple):
    """The GPU of a rank; its number says little, as it is 0 where each rank is shown its own alone."""

    host: str
    boot: str
    """The host, told from others of the name."""
    uuid: str


class Ranks:
    """One process's view of all ranks; the lifetime of the default process group.

    Control messages (errors, small results) travel over a gloo group of their own, so that they neither touch
    the GPU nor mix with the model's collectives.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        store: dist.Store | None,
        start: Start = starts.ONLY,
    ) -> None:
        self.placement = placement
        self.rank = placement.rank
        self.world_size = placement.world_size
        self.local_rank = placement.local_rank
        self.device = device
        self.is_main = placement.rank == 0
        self.launched_as = start
        """Which start of the ranks this is, where a launcher may start them again."""
        self._store = store
        self._control = (
            dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if store is not None else None
        )
        self._num_main_calls = self._num_barriers = 0
        self._activity = Activity()
        self._check: Callable[[], None] = lambda: None
        self._monitor: Monitor | None = None
        if store is not None:
            self._monitor = _start_monitor(placement, self._activity, start)
        # The error that all ranks raised together, if any: after it they may still meet, after others not.
        self.shared_error: GradsDistError | None = None

    @staticmethod
    def start(placement: Placement) -> "Ranks":
        """Start the process group (nccl on CUDA, else gloo; none for one rank), or return the started one.

        Raises ConfigError when the node has fewer GPUs than ranks, GradsDistError when the ranks cannot meet.
        """
        global _started
        if _started is None:
            launcher.export(placement)
            device = _own_device(placement)
            store, start = None, starts.ONLY
            if placement.world_size > 1:
                store, start = _rendezvous(placement)
                _init_group(device, store, placement.rank, placement.world_size)
            elif placement.launcher == "torchrun" and launcher.agent_holds_store():
                _, start = _rendezvous(placement)
            _started = Ranks(placement, device, store, start)
        return _started

    def ensure_group(self) -> None:
        """Start a group of one rank where there is none: DeepSpeed needs one even when alone."""
        if not dist.is_initialized():
            _init_group(self.device, dist.HashStore(), rank=0, world_size=1)

    def barrier(self) -> None:
        """Wait until every rank is here, however long that takes. Collective."""
        if self._store is None:
            return
        self._num_barriers += 1
        key = f"barrier/{self._num_barriers}"
        if self._store.add(key, 1) == self.world_size:
            self._store.set(f"{key}/open", "")
        self._wait_for(f"{key}/open")

    def on_main(self, fn: Callable[[], T]) -> T:
        """Run `fn` on rank 0; its result is returned, its GradsDistError raised, on every rank. Collective.

        `fn` may take longer than any collective's timeout. The result must be picklable.
        Any other exception leaves rank 0 at once, and the monitors end the others.
        """
        if self.world_size == 1:
            return fn()
        outcome: list[tuple[T | None, GradsDistError | None]] = [(None, None)]
        if self.is_main:
            outcome[0] = _attempt(fn)
        self._follow_main()
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        result, error = outcome[0]
        if error is not None:
            self.shared_error = error
            raise error
        return result  # type: ignore[return-value]  # None only where fn returned None

    def on_all(self, fn: Callable[[], T]) -> T:
        """Run `fn` on every rank; the GradsDistError of one is raised on all. Collective."""
        result, error = _attempt(fn)
        self.agree(error)
        return result  # type: ignore[return-value]  # there was no error

    def agree(self, error: GradsDistError | None) -> None:
        """Raise the error of the lowest rank that has one, on every rank. Collective."""
        errors = self.gather(error)
        first = next((e for e in errors if e is not None), None)
        if first is not None:
            self.shared_error = first
            raise first

    def check_devices(self) -> None:
        """Raise ConfigError on all ranks where two of them share a GPU. Collective."""
        problem = shared_gpu(self.gather(_own_gpu(self.device)))
        if problem is not None:
            self.shared_error = ConfigError(problem)
            raise self.shared_error

    def gather(self, obj: T) -> list[T]:
        """Collect one picklable object a rank, in rank order, on every rank. Collective."""
        if self.world_size == 1:
            return [obj]
        gathered: list[T | None] = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self._control)
        return gathered  # type: ignore[return-value]  # every slot is filled

    def report_once(self, report: Callable[[], None]) -> None:
        """Run `report` on the first rank that gets here; the others wait for it to be done, but never long.

        Not a collective: a rank that fails alone may call it while the others are elsewhere.
        """
        if self._store is None:
            report()
            return
        try:
            if self._store.add("report", 1) == 1:
                report()
                self._store.set("reported", "")
            else:
                self._store.wait(["reported"], REPORT_TIMEOUT)
        except dist.DistError:
            # The rank that holds the store is gone, after its own report.
            return

    def close(self) -> None:
        """End the process group when all ranks are done. Collective: not for a rank that failed alone."""
        global _started
        if _started is not self:
            return
        if self._control is not None and self._monitor is not None:
            # A rank that no longer says that it lives would look dead to one that still works.
            self.barrier()
            self._monitor.stop()
            # Not by the store: rank 0 may hold it, and must not leave while another is still looking.
            dist.barrier(group=self._control)
        if dist.is_initialized():
            dist.destroy_process_group()
        launcher.finish(self.placement)
        _started = None

    @contextlib.contextmanager
    def working(self, label: str) -> Iterator[None]:
        """A pass over the corpus, named `label`: signals are deferred, and a rank that hangs is noticed."""
        with stopping.deferred(), self._activity.working(label):
            yield

    def beat(self, doing: str, kind: str = "", cost: float = 0.0) -> None:
        """Say what this rank does now, such as `rows 12-19`; at the start of every micro-batch. No I/O.

        Until the next beat the rank may take five times as long as between earlier beats of the same kind,
        but at least 40 s, and 30 minutes for the first of a kind in a pass. An optimizer step that comes once
        in many micro-batches should be of a kind of its own.

        cost: roughly proportional to the time until the next beat, so that a batch that is larger than those
            before it has more time; 0 if not known.
        """
        self._check()
        self._activity.beat(doing, kind, cost)

    def check_at_beats(self, check: Callable[[], None]) -> None:
        """Let every beat of this rank begin with `check`, which raises if the run must not go on; no I/O."""
        self._check = check

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Inside `working`: something that may take long, such as writing a checkpoint."""
        with self._activity.aside("paused"):
            yield

    def stop_requested(self) -> str | None:
        """Name of the signal that asked this or, some seconds ago, another rank to stop. Local, no I/O."""
        return stopping.requested()

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. Collective, for use in every step.

        Between the hosts: on a GPU the answer would come behind all work that is queued there.
        """
        if self.world_size == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(flag) for flag in found.tolist())

    def meet(self) -> None:
        """Wait for all ranks, then raise Interrupted on all if any was asked to stop. Collective.

        Every pass ends so: a launcher ends the others when the first rank leaves, so they must be done too.
        """
        with stopping.deferred(), self._activity.aside("meeting"):
            self.barrier()
            name = self.stop_requested()
            self.agree(stopping.interrupted(name) if name is not None else None)

    def report_failures(self, tell: Callable[[str, str], None]) -> None:
        """Let `tell(line, before)` report why another rank, or this one, ended the run."""
        if self._monitor is not None:
            self._monitor.tell = tell

    def fail_alone(self, error: BaseException, message: str, before: str, code: int) -> NoReturn:
        """End this rank and the run because of an error that the others do not know of. For several ranks.

        Args:
            message: one line about the error.
            before: what is printed before it, such as a traceback.
        """
        assert self._monitor is not None
        if is_broken_collective(error):
            # Not the cause: another rank has gone.
            self._monitor.await_verdict()
        self._monitor.fail(message, before, code)

    def _follow_main(self) -> None:
        """Let rank 0 announce that its turn is over: waiting in a collective would time out."""
        assert self._store is not None
        key = f"main/{self._num_main_calls}"
        self._num_main_calls += 1
        if self.is_main:
            self._store.set(key, "")
            return
        self._wait_for(key)

    def _wait_for(self, key: str) -> None:
        """Wait for a key of the store by looking again and again, which never times out."""
        assert self._store is not None
        pause = 0.001
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def pick_device(local_rank: int, num_gpus: int) -> str:
    """The device of a rank on a node that shows it `num_gpus` GPUs.

    Raises ConfigError when there are GPUs, but fewer than ranks.
    """
    if num_gpus == 0:
        return "cpu"
    if num_gpus == 1:
        # Slurm and MPI set-ups may show each rank its own GPU only, as number 0: see `check_devices`.
        return "cuda:0"
    if local_rank >= num_gpus:
        raise ConfigError(
            f"ranks per node: local rank {local_rank} has no GPU; allowed: at most {num_gpus} on this node"
        )
    return f"cuda:{local_rank}"


def shared_gpu(gpus: Sequence[Gpu | None]) -> str | None:
    """What is wrong where two ranks have the same GPU, from those of all ranks; None if no two do."""
    seen: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu is None:
            continue
        first = seen.setdefault((gpu.boot, gpu.uuid), rank)
        if first != rank:
            return (
                f"ranks per node: ranks {first} and {rank} (host {gpu.host}) have the same GPU ({gpu.uuid}); "
                "allowed: one rank a GPU, and each rank shown its own if it is shown one"
            )
    return None


def is_broken_collective(error: BaseException) -> bool:
    """Whether `error` comes from a collective whose other end has gone, so that another rank is the cause."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or _BROKEN.search(str(error)) is None:
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any(part in file for file in files for part in _COLLECTIVE_FILES)


def _start_monitor(placement: Placement, activity: Activity, start: Start) -> Monitor:
    agent = launcher.agent_holds_store()
    keeper = "the agent of torchrun" if agent else "rank 0"
    holds_store = placement.rank == 0 and not agent
    monitor = Monitor(placement, activity, watch.connect(placement, start.keys), holds_store, keeper)
    monitor.start()
    return monitor


def _own_device(placement: Placement) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(pick_device(placement.local_rank, num_gpus))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        launcher.choose_cpu_for_deepspeed()
    return device


def _own_gpu(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return Gpu(socket.gethostname(), boot_id(), uuid)


def _rendezvous(placement: Placement) -> tuple[dist.Store, Start]:
    # An agent listens before it starts its ranks: if it does not answer, it is gone.
    agent, start = launcher.agent_holds_store(), starts.ONLY
    timeout = AGENT_ANSWERS_WITHIN if agent else COLLECTIVE_TIMEOUT
    rank, world_size = placement.rank, placement.world_size
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(COLLECTIVE_TIMEOUT)
        if agent:
            start = starts.number_start(store, rank, world_size, COLLECTIVE_TIMEOUT)
    except (dist.DistError, TimeoutError) as error:
        raise GradsDistError(_explain_rendezvous(placement, str(error))) from error
    return dist.PrefixStore(start.keys, store), start


def _explain_rendezvous(placement: Placement, message: str) -> str:
    where = f"MASTER_ADDR:MASTER_PORT: {placement.master_addr}:{placement.master_port}"
    if "EADDRINUSE" in message:
        return (
            f"{where}, where rank 0 ({socket.gethostname()}) listens, is in use, mostly by another run "
            "on the node; allowed: another port, set as MASTER_PORT or as the launcher's option"
        )
    first = " ".join(message.partition("\n")[0].split())
    return (
        f"{where}: rank {placement.rank} ({socket.gethostname()}) did not meet the others there ({first}); "
        "allowed: an address of rank 0's node that all nodes reach, and a port that no firewall closes"
    )


def _init_group(device: torch.device, store: dist.Store, rank: int, world_size: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )


def _attempt(fn: Callable[[], T]) -> tuple[T | None, GradsDistError | None]:
    try:
        return fn(), None
    except GradsDistError as error:
        return None, error
