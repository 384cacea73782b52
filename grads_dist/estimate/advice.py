"""Which ZeRO stage and which `probe.batch_tokens` fit a device, and what to do where nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grads_dist.estimate.memory import Layout, RankMemory

USABLE = 0.95
"""Of a device's memory: the rest is the driver's, and lost to fragmentation."""

LARGEST_BATCH = 65536

MemoryOf = Callable[[Layout, float, bool], RankMemory]
"""From a layout, padded tokens of the largest micro-batch and checkpointing to what a rank needs."""


@dataclass(frozen=True)
class Advice:
    """What to run with; `layout` is None where nothing fits.

    Args:
        layout: stage and offload.
        checkpointing: with gradient checkpointing.
        batch_tokens: a value of probe.batch_tokens that fits and leaves no rank idle.
        note: in words.
    """

    layout: Layout | None
    checkpointing: bool
    batch_tokens: int
    note: str


def advise(
    layouts: Sequence[Layout],
    memory_of: MemoryOf,
    memory: float,
    configured: int,
    longest: int,
    useful: int,
    checkpointing: bool,
) -> Advice:
    """The first layout that fits, in the order given, without checkpointing before with it.

    Args:
        layouts: from the one that communicates least.
        memory_of: what a rank needs.
        memory: of the device, bytes.
        configured: probe.batch_tokens.
        longest: tokens of the longest row, which no micro-batch can be smaller than.
        useful: tokens beyond which some rank has nothing to do.
        checkpointing: whether the configuration checkpoints already.
    """
    wanted = max(longest, min(configured, useful))
    for recompute in (True,) if checkpointing else (False, True):
        for tokens in (wanted, longest):
            for layout in layouts:
                if _fits(memory_of(layout, tokens, recompute), memory):
                    return _with_largest(layout, recompute, memory_of, memory, longest, useful)
    return Advice(None, checkpointing, longest, "")


def _with_largest(
    layout: Layout, recompute: bool, memory_of: MemoryOf, memory: float, longest: int, useful: int
) -> Advice:
    """With the largest power of two of tokens that fits and is of use."""
    limit = min(LARGEST_BATCH, max(useful, longest))
    tokens = 1 << (longest - 1).bit_length()
    if not _fits(memory_of(layout, max(tokens, longest), recompute), memory):
        return Advice(layout, recompute, longest, "no more than the longest row fits")
    while 2 * tokens <= limit and _fits(memory_of(layout, 2 * tokens, recompute), memory):
        tokens *= 2
    if 2 * tokens <= limit:
        return Advice(layout, recompute, tokens, "twice as many do not fit")
    if useful < LARGEST_BATCH:
        return Advice(layout, recompute, tokens, "with twice as many some ranks would have nothing to do")
    return Advice(layout, recompute, tokens, "more is of no use")


def _fits(needed: RankMemory, memory: float) -> bool:
    return needed.device <= USABLE * memory


def way_out(training: bool, has_adapter: bool, state_bytes: float, ranks: int) -> str:
    """What to do where nothing fits."""
    if not training:
        return (
            "nothing fits: take more ranks with ZeRO stage 3, a smaller data.max_length, or a quantised model"
        )
    ways = [] if has_adapter else ["LoRA (model.adapter)"]
    ways += ["ZeRO-3 with CPU offload (launch/zero3_offload.json)", "probe.mode frozen", "more ranks"]
    return (
        f"nothing fits: training needs {state_bytes / 1e9:,.0f} GB of states over {ranks} "
        f"rank{'s' * (ranks != 1)}; allowed: {', '.join(ways)}"
    )
