"""Which start of the ranks this is, where the store outlives them: torchrun may start them again.

torchrun's agent holds the store, and what ranks that died wrote there stays. Its count of restarts does not
tell the starts apart: each node counts for itself, and only failures of its own ranks. So rank 0 gives every
start a number, and all ranks put it before their keys. An agent ends all ranks before it starts any again.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
LONGEST_PAUSE = 0.5
"""Seconds between two looks at the store."""


@dataclass(frozen=True)
class Start:
    """One start of all ranks."""

    keys: str
    """What stands before their keys in the store."""
    launch: str | None = None
    """A name for all starts by the same agents; None where ranks are started once."""
    again: bool = False
    """Whether ranks met before that the same agents had started."""


ONLY = Start("grads_dist")
"""Of a store that ends with its ranks."""


def number_start(store: dist.Store, rank: int, world_size: int, patience: timedelta) -> Start:
    """Agree with the other ranks of this start on what to call it. Collective.

    Raises DistError when the store is gone, TimeoutError when not all ranks come within `patience`.
    """
    store = dist.PrefixStore("grads_dist_starts", store)
    deadline = time.monotonic() + patience.total_seconds()
    # Higher than that of any rank of an earlier start, as those are gone.
    ticket = int(store.add("tickets", 1))
    if rank > 0:
        start = _wait(lambda: _told(store, ticket), deadline)
        store.add(f"here/{start.keys}", 1)
        return start
    own = uuid.uuid4().hex
    launch = store.compare_set("launch", "", own).decode()
    start = Start(f"grads_dist/{ticket}", launch, again=launch != own)
    _wait(lambda: _tell(store, start, world_size), deadline)
    return start


def _tell(store: dist.Store, start: Start, world_size: int) -> bool:
    """Tell the ranks that have come so far; whether all have heard it."""
    store.set("start", json.dumps({"last": store.add("tickets", 0), **asdict(start)}))
    return int(store.add(f"here/{start.keys}", 0)) == world_size - 1


def _told(store: dist.Store, ticket: int) -> Start | None:
    """What rank 0 says; None while that may be of a rank 0 that is gone."""
    if not store.check(["start"]):
        return None
    said = json.loads(store.get("start"))
    return Start(**said) if said.pop("last") >= ticket else None


def _wait(look: Callable[[], T | None], deadline: float) -> T:
    """What `look` returns once that is something."""
    pause = 0.001
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError("not all ranks came")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return found
