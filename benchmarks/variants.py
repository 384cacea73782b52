"""What the benchmark of the probe compares: each with a model and, if any, an engine of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from per_sample import loop_step, vmap_step
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workload import Work

from grads_dist.config import Config
from grads_dist.data.config import DataConfig
from grads_dist.model.anatomy import dissect
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import load_model
from grads_dist.model.probed import Batch
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.session import Session
from grads_dist.probe.zero import fill_auto, join_ranks, load_deepspeed_config
from grads_dist.runtime.ranks import Ranks
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import Targets, resolve_targets

PAPER = ["embedding", "lm_head"]
LINEAR = [*PAPER, "linear"]
BASE = "plain"
"""The variant that all others are compared with."""
REFERENCE = "loop-linear"
"""The variant whose statistics the others must reproduce."""
VMAP_GRADIENT_BYTES = 512 << 20

Step = Callable[[Work], dict[str, Statistics] | None]
"""Processes one micro-batch; gives the statistics of its samples, if it computes any."""


@dataclass(frozen=True)
class Setup:
    """What a variant is built from."""

    model_folder: str
    global_batch: int
    batch_tokens: int
    ranks: Ranks
    adapter: str | None = None
    dtype: str = "float32"
    num_rows: int = 0
    """Rows that there are in all."""
    deepspeed: str | None = None
    """DeepSpeed JSON file; unset, the program's default."""
    checkpointing: str = "none"
    """Gradient checkpointing, as in the model's configuration."""

    @property
    def model_config(self) -> ModelConfig:
        """The benchmark's model."""
        return ModelConfig(
            name_or_path=self.model_folder,
            adapter=self.adapter,
            dtype=self.dtype,  # type: ignore[arg-type]
            gradient_checkpointing=self.checkpointing,  # type: ignore[arg-type]
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the weights."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def probe_config(self, mode: str, targets: list[str]) -> ProbeConfig:
        """Learning rate 0: an update costs the same, and all variants stay at the same weights."""
        return ProbeConfig(
            mode=mode,  # type: ignore[arg-type]
            targets=targets,
            global_batch=self.global_batch,
            batch_tokens=self.batch_tokens,
            learning_rate=0.0,
        )


@dataclass(frozen=True)
class Variant:
    """One way to process a micro-batch.

    Args:
        name: as in the results.
        computes: what is done for a batch, so that a cheaper job is not taken for a faster one.
        build: makes the function that is timed.
        may_fail: a rival that need not work for every model and size; it is then reported as unrun.
        fields: what it finds of each gradient, to be compared with the reference.
    """

    name: str
    computes: str
    build: Callable[[Setup], Step]
    may_fail: bool = False
    fields: tuple[str, ...] = ("sum", "sumsq", "min", "max")


def plain_step(setup: Setup) -> Step:
    """A training micro-step as a user of DeepSpeed writes it, with the same DeepSpeed configuration."""
    import deepspeed

    ranks = setup.ranks
    model = load_model(setup.model_config, setup.torch_dtype, ranks.device)
    config = fill_auto(
        load_deepspeed_config(setup.deepspeed),
        setup.probe_config("train", PAPER),
        setup.torch_dtype,
        hidden_size=model.config.get_text_config().hidden_size,
        num_steps=1,
        ranks=ranks,
    )
    join_ranks(ranks)
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)

    def step(work: Work) -> None:
        batch = work.batch
        engine.set_gradient_accumulation_boundary(work.ends_step)
        engine.backward(plain_loss(engine, batch), scale_wrt_gas=False)
        engine.step()

    return step


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's label tokens, as users of a model write it."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.token_mask.long(), use_cache=False)
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def make_session(setup: Setup, mode: str, targets: list[str]) -> Session:
    """The probe's own session, on a model of its own."""
    config = Config(
        model=setup.model_config,
        data=DataConfig(path="unread"),
        probe=setup.probe_config(mode, targets),
        deepspeed=setup.deepspeed,
    )
    return Session(config, setup.ranks)


def training_step(setup: Setup, targets: list[str], record: bool) -> Step:
    """A training micro-step of the probe, with the statistics of `targets` or without any."""
    session = make_session(setup, "train", targets)

    def step(work: Work) -> dict[str, Statistics] | None:
        found = session.train_micro_batch(work.batch, work.ends_step, record)
        session.update()
        return None if found is None else found.stats

    return step


def frozen_step(setup: Setup, targets: list[str]) -> Step:
    """The probe at fixed weights."""
    session = make_session(setup, "frozen", targets)
    return lambda work: session.measure(work.batch).stats


def _features(setup: Setup) -> Step:
    session = make_session(setup, "frozen", ["lm_head"])

    def step(work: Work) -> None:
        session.features(work.batch, "label")

    return step


def per_sample_loop(setup: Setup, targets: list[str]) -> Step:
    """Autograd one sample at a time."""
    model, resolved = model_and_targets(setup, targets)
    step = loop_step(model, resolved)
    return lambda work: step(work.batch)


def per_sample_vmap(setup: Setup, targets: list[str]) -> Step:
    """torch.func over a chunk of samples."""
    model, resolved = model_and_targets(setup, targets)
    step = vmap_step(model, resolved, VMAP_GRADIENT_BYTES)
    return lambda work: step(work.batch)


def model_and_targets(setup: Setup, targets: list[str]) -> tuple[nn.Module, Targets]:
    """A model of one's own, and the parameters that targets stand for in it."""
    model = load_model(setup.model_config, setup.torch_dtype, setup.ranks.device)
    anatomy = dissect(model)
    if anatomy.tied:
        # Autograd would give the sum of both uses; the targets are each as if untied.
        anatomy.head.weight = nn.Parameter(anatomy.head.weight.detach().clone())
    return model, resolve_targets(targets, dissect(model))


_BOTH = "embedding and lm_head"
_ALL = "embedding, lm_head and every linear layer"
_TRAIN = "training step"
_FROZEN = "at frozen weights, no weight gradient, no update"

VARIANTS = (
    Variant(BASE, f"{_TRAIN}, plain DeepSpeed", plain_step),
    Variant(
        "session",
        f"{_TRAIN}, loss at label positions only",
        partial(training_step, targets=PAPER, record=False),
    ),
    Variant(
        "probed", f"{_TRAIN} + statistics of {_BOTH}", partial(training_step, targets=PAPER, record=True)
    ),
    Variant(
        "probed-linear",
        f"{_TRAIN} + statistics of {_ALL}",
        partial(training_step, targets=LINEAR, record=True),
    ),
    Variant("frozen", f"statistics of {_BOTH} {_FROZEN}", partial(frozen_step, targets=PAPER)),
    Variant("frozen-linear", f"statistics of {_ALL} {_FROZEN}", partial(frozen_step, targets=LINEAR)),
    Variant(
        "frozen-head", "statistics of lm_head, forward pass only", partial(frozen_step, targets=["lm_head"])
    ),
    Variant("features", "content features, forward pass only", _features),
    Variant(
        "loop", f"statistics of {_BOTH}, autograd sample by sample", partial(per_sample_loop, targets=PAPER)
    ),
    Variant(
        REFERENCE,
        f"statistics of {_ALL}, autograd sample by sample",
        partial(per_sample_loop, targets=LINEAR),
    ),
    Variant(
        "vmap", f"statistics of {_BOTH}, torch.func vmap(grad)", partial(per_sample_vmap, targets=PAPER), True
    ),
    Variant(
        "vmap-linear",
        f"statistics of {_ALL}, torch.func vmap(grad)",
        partial(per_sample_vmap, targets=LINEAR),
        True,
    ),
)
