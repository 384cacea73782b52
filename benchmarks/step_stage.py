"""The variants of bench_step.py, which take turns on one training engine and one frozen model."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from variants import LINEAR, PAPER, Setup, make_session, plain_loss
from workload import Work

from grads_dist.probe.session import Session
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.targets import resolve_targets


@dataclass(frozen=True)
class StepVariant:
    """One way to process a micro-batch.

    Args:
        name: as in the results.
        computes: what is done.
        passes: `train`, `frozen` or `forward`: what of the model's own work is in it.
        targets: what statistics are read of; None for none.
    """

    name: str
    computes: str
    passes: str
    targets: list[str] | None

    @property
    def mode(self) -> str:
        """The session's."""
        return "train" if self.passes == "train" else "frozen"


BASE = "plain"
_STEP, _BOTH, _ALL = "training step", "embedding and lm_head", "embedding, lm_head and every linear layer"
_FROZEN = "at frozen weights, no weight gradient, no update"
VARIANTS = (
    StepVariant(BASE, f"{_STEP}, plain DeepSpeed", "train", None),
    StepVariant("session", f"{_STEP}, logits never whole", "train", None),
    StepVariant("probed", f"{_STEP} + statistics of {_BOTH}", "train", PAPER),
    StepVariant("probed-linear", f"{_STEP} + statistics of {_ALL}", "train", LINEAR),
    StepVariant("frozen", f"statistics of {_BOTH} {_FROZEN}", "frozen", PAPER),
    StepVariant("frozen-linear", f"statistics of {_ALL} {_FROZEN}", "frozen", LINEAR),
    StepVariant("frozen-head", "statistics of lm_head, forward pass only", "forward", ["lm_head"]),
)


class Stage:
    """A session on which the variants of one mode run, one at a time.

    Two models of 8B parameters with all that training adds to them do not fit on one device, so variants
    that are compared share one. What a variant hangs into the model is taken out again for the next.
    """

    def __init__(self, setup: Setup, mode: str) -> None:
        self._setup, self._mode = setup, mode
        self._session: Session | None = None
        self._variant: StepVariant | None = None
        self.state_bytes = 0
        """What weights and optimizer take on the GPU; gradients are part of a step."""

    def prepare(self, variant: StepVariant) -> None:
        """Make the model ready for `variant`; loads it if it is not there."""
        session = self._session or self._open()
        probed, anatomy = session.model, session.model.anatomy
        session.recorder.detach()
        if variant.name == BASE:
            vars(anatomy.head).pop("forward", None)
            probed.forward = lambda batch: plain_loss(probed.causal_lm, batch)  # type: ignore[method-assign]
        else:
            vars(probed).pop("forward", None)
            probed.fuse_head()
        # Of the head alone nothing hangs in the layers.
        targets = resolve_targets(variant.targets or ["lm_head"], anatomy)
        session.recorder = probed.recorder = Recorder(anatomy, targets)
        self._variant = variant

    def run(self, work: Work) -> None:
        """The prepared variant's step on one micro-batch, in training with an update."""
        session, variant = self._session, self._variant
        assert session is not None and variant is not None
        if variant.mode == "frozen":
            session.measure(work.batch)
        elif variant.name == BASE:
            session.engine.set_gradient_accumulation_boundary(True)
            session.engine.backward(session.engine(work.batch), scale_wrt_gas=False)
            session.engine.step()
        else:
            session.train_micro_batch(work.batch, True, record=variant.targets is not None)
            session.update()

    def close(self) -> None:
        """Let go of the model, also after a step that ended half way."""
        if self._session is not None:
            self._session.close()
        self._session = None
        gc.collect()
        if self._setup.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _open(self) -> Session:
        before = allocated(self._setup.ranks.device)
        self._session = make_session(self._setup, self._mode, ["lm_head"])
        self.state_bytes = allocated(self._setup.ranks.device) - before
        return self._session


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
