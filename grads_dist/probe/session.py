"""The model under probe on this rank: recorder, DeepSpeed engine if there is one, and passes over batches."""

from __future__ import annotations

import gc
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_dist.config import Config
from grads_dist.model.anatomy import check_head, dissect
from grads_dist.model.load import load_model, load_text_config
from grads_dist.model.probed import Batch, ProbedModel
from grads_dist.probe.batches import check_batch
from grads_dist.probe.features import gradient_sketcher
from grads_dist.probe.zero import (
    check_supported,
    fill_auto,
    join_ranks,
    load_deepspeed_config,
    probe_dtype,
    start_engine,
    zero_stage,
)
from grads_dist.runtime.ranks import Ranks
from grads_dist.stats.head_request import HeadResult
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import Targets, resolve_targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """What one recorded micro-batch yields, on the device."""

    head: HeadResult
    stats: dict[str, Statistics]
    features: Tensor | None
    """Content features [S, D], if asked for."""
    sketch: Tensor | None = None
    """Sketches of the gradients [S, k * k], if asked for."""


class Session:
    """A loaded model ready for probing; collective to build.

    Args:
        num_steps: optimizer steps that will be made, for a learning rate schedule.

    Frozen mode needs DeepSpeed at ZeRO stage 3 alone, for its partitioned weights; below it every rank works
    on a plain copy and nothing is communicated. Train mode always runs under DeepSpeed.
    """

    def __init__(self, config: Config, ranks: Ranks, num_steps: int = 1) -> None:
        probe = config.probe
        deepspeed_config = load_deepspeed_config(config.deepspeed)
        self.ranks = ranks
        self.stage = zero_stage(deepspeed_config)
        self.engine: Any = None
        self._num_skipped = 0
        dtype = probe_dtype(config.model, deepspeed_config, ranks.device)
        check_supported(probe, dtype, self.stage, ranks.device)
        sharded, training = self.stage == 3, probe.mode == "train"
        self.training = training
        """Whether passes update the weights."""
        if sharded:
            join_ranks(ranks)
        hidden_size = load_text_config(config.model).hidden_size
        self.deepspeed = fill_auto(deepspeed_config, probe, dtype, hidden_size, num_steps, ranks)
        model = load_model(config.model, dtype, ranks.device, self.deepspeed if sharded else None)
        if not training:
            model.requires_grad_(False)
        anatomy = dissect(model)
        self.targets: Targets = resolve_targets(probe.targets, anatomy)
        self.sketcher = gradient_sketcher(probe, anatomy)
        self.recorder = Recorder(anatomy, self.targets, self.sketcher, probe.statistics == "all")
        self.model = ProbedModel(anatomy, self.recorder, probe.head_chunk_mib << 20)
        if sharded and not training:
            # DeepSpeed builds no engine without something to optimise.
            self.model.register_parameter("placeholder", nn.Parameter(torch.zeros(1, dtype=dtype)))
        if training or sharded:
            self.engine = start_engine(self.model, self.deepspeed, ranks)
        check_head(anatomy, ranks.device)
        self.model.fuse_head()

    @property
    def lockstep(self) -> bool:
        """Whether a forward pass is collective, so that idle ranks must take part with dummy batches."""
        return self.stage == 3

    def close(self) -> None:
        """Let go of the model's memory, so that another can be loaded."""
        if self.engine is not None:
            self.engine.destroy()
        for parameter in self.model.parameters():
            if hasattr(parameter, "ds_tensor"):
                # DeepSpeed keeps the models that it has sharded in tables of its own, for ever.
                parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)
        self.engine = None
        del self.model, self.recorder, self.sketcher
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def freeze(self) -> None:
        """End training: from here on no weight gradient is computed."""
        self.training = False
        self.model.causal_lm.requires_grad_(False)

    @torch.no_grad()
    def features(self, batch: Batch, tokens: str) -> Tensor:
        """Content features of a batch [S, D] from a forward pass alone."""
        self.model(batch, feature_tokens=tokens, loss=False)
        assert self.model.features is not None
        return self.model.features

    def measure(
        self, batch: Batch, feature_tokens: str | None = None, sketching: bool = False
    ) -> Measurement:
        """Statistics at the present weights; no weight gradient, and no backward pass unless needed."""
        backward = self.recorder.needs_backward
        mode: AbstractContextManager = nullcontext() if backward else torch.no_grad()
        with mode, self.recorder.batch(batch.layout, sketching):
            total = self.model(batch, record=True, feature_tokens=feature_tokens)
            if backward:
                total.backward()
        if self.stage == 3:
            # A layer whose input needs no gradient is gathered for the backward pass and not let go after it.
            self.engine.empty_partition_cache()
        return self._measurement(batch)

    def train_micro_batch(self, batch: Batch, last_of_step: bool, record: bool) -> Measurement | None:
        """Forward and backward of one micro-batch of a step; `update` belongs behind it.

        The batch's weights must sum, over all ranks and micro-batches, to the world size: DeepSpeed averages
        over ranks.
        """
        self.engine.set_gradient_accumulation_boundary(last_of_step)
        around = self.recorder.batch(batch.layout) if record else nullcontext()
        with around:
            total = self.engine(batch, record=record)
            self.engine.backward(total, scale_wrt_gas=False)
        return self._measurement(batch) if record else None

    def update(self) -> None:
        """End a micro-batch: after the last of a step the optimizer's update.

        It is left out if the gradient of the step is not finite. DeepSpeed looks for itself, by a norm over
        all ranks, at ZeRO stages 1 to 3. At stage 0 every rank has the whole gradient, the same on all.
        """
        if self.stage == 0 and self.engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                self._num_skipped += 1
                self.engine.zero_grad()
                return
        self.engine.step()

    def rehearse(self, batch: Batch, record: bool) -> None:
        """Pass a batch of weight 0 as the others will be passed; changes no weight and no statistics.

        record: whether statistics are read of the others. Collective where passes are.
        """
        if self.training:
            self.train_micro_batch(batch, last_of_step=False, record=record)
            self.update()
        elif record:
            self.measure(batch)
        else:
            self.features(batch, "label")

    def check_targets(self) -> None:
        """Pass a few made-up tokens, so that a layer that cannot be read is found before any row is passed.

        Changes no weight and nothing that training goes on from. Raises ConfigError naming a layer that is
        not called, or twice. Collective where passes are.
        """
        if not self.recorder.needs_backward:
            return
        if self.training and self.stage == 3:
            # With frozen weights DeepSpeed would still queue gradients of its leaf modules, the mixtures.
            self.train_micro_batch(self._check_batch(weight=0.0), last_of_step=False, record=True)
            self.update()
            return
        trained = [p for p in self.model.causal_lm.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        self.measure(self._check_batch(weight=1.0))
        for parameter in trained:
            parameter.requires_grad_(True)

    def _check_batch(self, weight: float) -> Batch:
        anatomy = self.model.anatomy
        return check_batch(anatomy.vocab_size, anatomy.head_counts, weight, self.ranks.device)

    @property
    def num_skipped(self) -> int:
        """Optimizer steps left out so far because a gradient was not finite, the same on all ranks."""
        return self._num_skipped + (int(self.engine.skipped_steps) if self.engine is not None else 0)

    def restore_skipped(self, total: int) -> None:
        """Count on from `total` skipped steps, of which the engine knows its own."""
        self._num_skipped = total - int(self.engine.skipped_steps)

    def _measurement(self, batch: Batch) -> Measurement:
        head = self.model.head_result
        assert head is not None
        # A dummy batch has weight 0, so that its gradients cannot be freed of it, and no rows to report.
        if not len(batch.rows):
            return Measurement(head, {}, self.model.features)
        stats = self.recorder.finish(head)
        return Measurement(head, stats, self.model.features, self.recorder.sketch(head))
