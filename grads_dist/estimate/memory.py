"""Memory of one rank at each ZeRO stage, and of the host that rank 0 runs on.

Sizes of states are those that DeepSpeed 0.19 allocates: from stage 1 on it keeps float32 weights beside the
model's own whatever their type, and Adam's two moments in float32, 12 bytes a trained parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grads_dist.estimate.activations import Activations
from grads_dist.estimate.facts import Facts
from grads_dist.probe.config import ProbeConfig
from grads_dist.stats.sketch import BLOCK_ROWS

MOMENTS = 8
MASTER = 4
"""Bytes a trained parameter: Adam's moments; the float32 weights of ZeRO stages 1 to 3."""

BUCKET_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
"""DeepSpeed's own, in elements, where its file says nothing."""

BYTES_A_ROW = 40
"""Of rank 0's host: places in two plans, keys of the table and their order."""

ALLOCATOR_SHARE = 0.05
"""Of everything: what the allocator holds and nobody uses."""


@dataclass(frozen=True)
class Layout:
    """How a rank's weights and states lie.

    Args:
        name: what the report calls it.
        stage: of ZeRO; None without DeepSpeed.
        offload: whether gradients and optimizer states lie in the host's memory.
    """

    name: str
    stage: int | None
    offload: bool = False
    training: bool = True


TRAINED = (
    Layout("ZeRO-0", 0),
    Layout("ZeRO-1", 1),
    Layout("ZeRO-2", 2),
    Layout("ZeRO-3", 3),
    Layout("ZeRO-3, CPU offload", 3, offload=True),
)
FROZEN = (
    Layout("frozen, whole on each rank", None, training=False),
    Layout("frozen, ZeRO-3", 3, training=False),
)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device; `host` is what it has in the memory of its node instead."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of the largest micro-batch, without what is kept for the statistics."""
    capture: float
    """Kept or made for the statistics: layer inputs, a layer's output gradient and products."""
    head: float
    """The LM head's logits and gradients."""
    buckets: float
    host: float

    @property
    def device(self) -> float:
        """All that is on the device."""
        parts = [value for name, value in vars(self).items() if name != "host"]
        return sum(parts) * (1 + ALLOCATOR_SHARE)


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch: padded and label tokens."""

    padded: float
    labels: float
    checkpointing: bool


def rank_memory(
    layout: Layout,
    facts: Facts,
    kept: Activations,
    batch: Batch,
    probe: ProbeConfig,
    dtype: torch.dtype,
    zero: dict[str, Any],
    ranks: int,
    on_cpu: bool = False,
) -> RankMemory:
    """Bytes of one rank.

    Args:
        layout: stage and offload.
        facts: the model and its targets.
        kept: what its forward pass keeps.
        batch: the largest micro-batch.
        probe: for the head's chunks.
        dtype: type of the weights.
        zero: the section `zero_optimization` of the DeepSpeed file, "auto" values filled in.
        ranks: ranks of the run.
        on_cpu: memory that is allocated but never written takes no room there.
    """
    trained = facts.num_trained if layout.training else 0
    trained_bytes = facts.trained_bytes if layout.training else 0
    sharded = layout.stage == 3
    weights = facts.weight_bytes / ranks if sharded else float(facts.weight_bytes)
    gradients = float(trained_bytes)
    if layout.stage in (2, 3):
        gradients /= ranks
    optimizer = float(trained * MOMENTS)
    if layout.stage != 0:
        optimizer = trained * (MASTER + MOMENTS) / ranks
    host = 0.0
    if layout.offload:
        host, gradients, optimizer = gradients + optimizer, 0.0, 0.0
    whole = kept.bytes_of(batch.padded, batch.checkpointing)
    for_statistics = 0.0 if batch.checkpointing else kept.capture * batch.padded / kept.length
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=whole - for_statistics,
        capture=for_statistics + _in_flight(facts, batch, dtype),
        head=_head(facts, batch, probe, dtype, layout.training),
        buckets=_buckets(layout, facts, zero, dtype, ranks, on_cpu),
        host=host,
    )


def _in_flight(facts: Facts, batch: Batch, dtype: torch.dtype) -> float:
    """What a targeted layer has while it is read: both factors packed, and one sample's product."""
    read = [weight for weight in facts.weights if weight.read or weight.sketched]
    widest = max((w.outputs + w.inputs for w in read), default=0)
    product = max((w.outputs * w.inputs for w in read), default=0)
    rows = batch.padded * facts.hidden_size * dtype.itemsize if facts.needs_backward else 0.0
    signs = 4.0 * BLOCK_ROWS * widest if any(w.sketched for w in read) else 0.0
    return batch.padded * widest * dtype.itemsize + 8.0 * product + rows + signs


def _head(facts: Facts, batch: Batch, probe: ProbeConfig, dtype: torch.dtype, training: bool) -> float:
    """A chunk of logits (in float32, and once more in a narrower type), and the gradients it adds to."""
    wide = max(4, dtype.itemsize)
    chunk = min(float(probe.head_chunk_mib << 20), batch.labels * facts.vocab_size * wide)
    copies = 1.0 if dtype.itemsize >= 4 else 2.0
    if facts.head_read:
        copies += 0.5  # Its squares and bounds, some at a time.
    gradient = facts.vocab_size * facts.hidden_size * wide if training and facts.head_trained else 0.0
    hidden = batch.labels * facts.hidden_size * (wide + dtype.itemsize)
    return chunk * copies + gradient + hidden


def _buckets(
    layout: Layout, facts: Facts, zero: dict[str, Any], dtype: torch.dtype, ranks: int, on_cpu: bool
) -> float:
    """DeepSpeed's buffers for collectives, and at stage 3 the weights that are gathered at a time."""

    def elements(name: str) -> float:
        value = zero.get(name, BUCKET_DEFAULTS[name])
        return float(value)

    if layout.stage is None:
        return 0.0
    total = 0.0
    if layout.training and layout.stage >= 1:
        # DeepSpeed allocates the bucket whole, however small the model is.
        bucket = elements("reduce_bucket_size")
        if on_cpu:
            bucket = min(bucket, float(facts.num_trained))
        total = bucket * (2 if zero.get("overlap_comm") else 1)
    if layout.stage == 3 and ranks > 1:
        gathered = elements("stage3_prefetch_bucket_size") + facts.largest_weight
        total += min(gathered, elements("stage3_max_live_parameters"), float(facts.num_params))
    return total * dtype.itemsize


def host_memory(facts: Facts, num_rows: float) -> float:
    """Bytes of rank 0's host beside what is offloaded: the checkpoint while it is read, and for every row
    two plans and the keys that the table is merged by. Below stage 3 every other rank of the node reads the
    checkpoint into memory of its own."""
    return facts.weight_bytes + BYTES_A_ROW * num_rows
