"""Memory of the planned run at every stage, what fits, and what to run with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from grads_dist.config import Config
from grads_dist.estimate.activations import count_activations
from grads_dist.estimate.advice import USABLE, Advice, MemoryOf, advise, way_out
from grads_dist.estimate.facts import Facts
from grads_dist.estimate.hardware import CPU, Hardware
from grads_dist.estimate.memory import (
    FROZEN,
    MASTER,
    MOMENTS,
    TRAINED,
    Batch,
    Layout,
    RankMemory,
    host_memory,
    rank_memory,
)
from grads_dist.estimate.sample import Sample
from grads_dist.estimate.workload import Pass, sizes_of
from grads_dist.probe.run import at_checkpoint
from grads_dist.probe.zero import fill_auto, load_deepspeed_config, zero_stage
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks


@dataclass(frozen=True)
class Needs:
    """Memory, in bytes.

    Args:
        hardware: the device.
        device_memory: what it has.
        batch: the largest planned micro-batch.
        counted: whether activations were counted; else they are a rule of thumb.
        layouts: for each stage the parts of a rank's memory, the sum without and with gradient checkpointing,
            and whether each fits.
        host: of rank 0's node, beside what is offloaded.
        states: weights, gradients and optimizer over all ranks, when trained in this type.
        advice: what to run with, in words, and its values.
    """

    hardware: str
    device_memory: float
    batch: dict[str, float]
    counted: bool
    layouts: list[dict[str, Any]]
    host: float
    states: float
    advice: dict[str, Any]


def find_needs(
    config: Config,
    sample: Sample,
    passes: list[Pass],
    facts: Facts,
    hardware: Hardware,
    dtype: torch.dtype,
    ranks: int,
) -> Needs:
    """What the planned run needs on each rank at each stage."""
    training = config.probe.mode == "train"
    batch, longest = _largest(passes)
    checkpointing = config.model.gradient_checkpointing != "none"
    model = at_checkpoint(config, 0).model if config.probe.checkpoints else config.model
    layouts = _layouts(training, dtype, facts)
    kept = {
        trains: count_activations(model, dtype, facts.read, trains, longest)
        for trains in {layout.training for layout in layouts}
    }
    zero = _zero_section(config, dtype, facts)

    def memory_of(layout: Layout, padded: float, recompute: bool) -> RankMemory:
        scaled = replace(
            batch, padded=padded, labels=batch.labels * padded / batch.padded, checkpointing=recompute
        )
        on_cpu = hardware.name == CPU
        activations = kept[layout.training]
        if not layout.training and not facts.needs_backward:
            activations = replace(activations, layers=0.0, largest_layer=0.0, boundary=0.0)
        return rank_memory(layout, facts, activations, scaled, config.probe, dtype, zero, ranks, on_cpu)

    offered = [layout for layout in layouts if layout.training is training]
    configured = zero_stage(load_deepspeed_config(config.deepspeed))
    offered.sort(key=lambda layout: (layout.offload, layout.stage or 0, layout.stage != configured))
    advice = advise(
        offered,
        memory_of,
        hardware.memory,
        config.probe.batch_tokens,
        int(sample.num_tokens.max()),
        _useful_tokens(config, passes, ranks) if training else 1 << 40,
        checkpointing,
    )
    states = float(facts.trained_bytes * 2 + facts.num_trained * (MASTER + MOMENTS))
    return Needs(
        hardware=hardware.name,
        device_memory=hardware.memory,
        batch={"padded_tokens": batch.padded, "label_tokens": batch.labels, "longest": longest},
        counted=all(found.exact for found in kept.values()),
        layouts=[_described(layout, memory_of, batch, hardware) for layout in layouts],
        host=host_memory(facts, sample.num_usable),
        states=states,
        advice=_in_words(advice, training, config.model.adapter is not None, states, ranks),
    )


def _largest(passes: list[Pass]) -> tuple[Batch, int]:
    """The micro-batch with the most padded tokens of those that go backward, and its longest row."""
    backward = [work for work in passes if work.kind != "features"]
    best: tuple[float, float, float] = (0.0, 0.0, 0.0)
    for work in backward:
        sizes = sizes_of(work)
        k = int(np.argmax(sizes.padded))
        best = max(best, (float(sizes.padded[k]), float(sizes.longest[k]), float(sizes.labels[k])))
    padded, longest, labels = best
    return Batch(padded, labels, False), int(longest)


def _layouts(training: bool, dtype: torch.dtype, facts: Facts) -> list[Layout]:
    """Those to show: frozen mode also beside training, since it may be what fits."""
    if not training:
        return list(FROZEN)
    # Stage 0 trains the weights as they are, which the probe refuses in 16 bits.
    return [layout for layout in TRAINED if layout.stage != 0 or dtype == torch.float32] + list(FROZEN)


def _zero_section(config: Config, dtype: torch.dtype, facts: Facts) -> dict[str, Any]:
    here = Ranks.start(detect())
    deepspeed = load_deepspeed_config(config.deepspeed)
    filled = fill_auto(deepspeed, config.probe, dtype, facts.hidden_size, 1, here)
    found: dict[str, Any] = filled["zero_optimization"]
    return found


def _useful_tokens(config: Config, passes: list[Pass], ranks: int) -> int:
    """Padded tokens of a micro-batch beyond which a step has fewer micro-batches than there are ranks."""
    trained = next(work for work in passes if work.trains)
    sizes = sizes_of(trained)
    return int(sizes.padded.sum() / max(1, len(trained.groups)) / ranks)


def _described(layout: Layout, memory_of: MemoryOf, batch: Batch, hardware: Hardware) -> dict[str, Any]:
    plain = memory_of(layout, batch.padded, False)
    recomputed = memory_of(layout, batch.padded, True)
    limit = USABLE * hardware.memory
    return {
        "name": layout.name,
        "stage": layout.stage,
        "offload": layout.offload,
        **vars(plain),
        "total": plain.device,
        "fits": plain.device <= limit,
        "total_checkpointing": recomputed.device,
        "fits_checkpointing": recomputed.device <= limit,
    }


def _in_words(advice: Advice, training: bool, adapter: bool, states: float, ranks: int) -> dict[str, Any]:
    if advice.layout is None:
        text = way_out(training, adapter, states, ranks)
        return {"layout": None, "batch_tokens": None, "checkpointing": None, "text": text}
    how = " with model.gradient_checkpointing nonreentrant" if advice.checkpointing else ""
    text = f"{advice.layout.name}{how}, probe.batch_tokens {advice.batch_tokens} ({advice.note})"
    return {
        "layout": advice.layout.name,
        "batch_tokens": advice.batch_tokens,
        "checkpointing": advice.checkpointing,
        "text": text,
    }
