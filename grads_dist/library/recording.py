"""Per-sample gradient statistics of whatever forward and backward pass runs inside a `with` block.

Shape legend: S samples of the last batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.library.batch import RecordedBatch
from grads_dist.library.heads import FusedHead, LinearHead
from grads_dist.library.inputs import Inputs, read_inputs
from grads_dist.library.unwrap import anatomy_of, is_causal_lm, unwrap
from grads_dist.model.anatomy import Anatomy
from grads_dist.stats.head_request import HeadResult
from grads_dist.stats.recorder import Recorder, distinct_ids
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import Targets, resolve_targets

DEFAULT_TARGETS = ("embedding", "lm_head")


@contextmanager
def record(
    model: nn.Module, targets: Sequence[str] | Mapping[str, str] = DEFAULT_TARGETS
) -> Iterator[Recording]:
    """Read per-sample gradient statistics of the passes inside the block; the model is left as it was.

    Args:
        model: any module, or one wrapped by DDP, DeepSpeed (ZeRO stage 0 to 3), accelerate or PEFT. The
            leading axis of its input is the sample; for a causal language model, a row of `input_ids`.
        targets: names (`embedding`, `lm_head`, `tied`, `layers`, `linear`, `norms`, `biases`, `experts`,
            `adapters`), or a map from names of your own to regular expressions, each matched against whole
            qualified parameter names of the module inside all wrappers.

    Raises ConfigError naming a target without a rule, or a wrapper or batch whose samples cannot be told
    apart.

    >>> import torch, grads_dist
    >>> model = torch.nn.Linear(3, 2)
    >>> with grads_dist.record(model, targets={"weight": "weight"}) as recording:
    ...     losses = recording.sample_losses(model(torch.ones(4, 3)).square().sum(1))
    ...     losses.mean().backward()
    >>> recording.statistics()["weight"].norm().shape
    torch.Size([4])
    """
    recording = Recording(model, targets)
    try:
        with recording.reading():
            yield recording
    finally:
        recording.detach()


class Recording:
    """Reads the statistics of a model's targets, one batch at a time; `record` gives one to a `with` block.

    A batch is a forward pass with gradients and the backward pass that follows. Ask for its numbers before
    the next one, as with gradient accumulation, or after the block. They are freed of the factor that the
    batch puts on each sample's loss where that factor is known: see `factors`.

    Attributes:
        targets: for every target the parameter names it holds (`members`) and how many elements (`numel`).
    """

    def __init__(self, model: nn.Module, targets: Sequence[str] | Mapping[str, str]) -> None:
        module = unwrap(model)
        anatomy = anatomy_of(module)
        self.targets = _resolve(targets, anatomy)
        self._anatomy = anatomy
        self._recorder = Recorder(anatomy, self.targets)
        self._linear_head, self._fused_head = None, None
        if is_causal_lm(module):
            self._fused_head = FusedHead(anatomy)
            if self._recorder.needs_head:
                self._linear_head = LinearHead(anatomy)
        self._handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._leave),
        ]
        self._reading, self._checked = False, False
        self._open = ExitStack()
        self._batch: RecordedBatch | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read the passes inside this block and no others."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
            self._end_batch()
            if self._batch is not None:
                self._batch.close()

    def detach(self) -> None:
        """Remove everything from the model; the last batch's numbers stay."""
        self._end_batch()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._recorder.detach()
        for head in (self._linear_head, self._fused_head):
            if head is not None:
                head.detach()

    @property
    def num_samples(self) -> int:
        """S."""
        return self._last().num_samples

    @property
    def num_label_tokens(self) -> Tensor | None:
        """Tokens that carry loss, int64 [S]; None where the model was given no labels."""
        labels = self._last().inputs.labels
        return None if labels is None else labels.counts.long()

    @property
    def loss(self) -> Tensor | None:
        """Mean cross-entropy of each sample over its label tokens [S]; None where the model had no labels."""
        return self._last().losses

    @property
    def el2n(self) -> Tensor | None:
        """Mean over each sample's label tokens of the norm of softmax minus one-hot [S], as for `loss`."""
        return self._last().el2n

    @property
    def factors(self) -> Tensor | None:
        """What each sample's mean loss was multiplied by on its way to the gradients, float64 [S].

        Everything is in it: the sample's share in the batch's loss, accumulation, loss scaling, world size.
        None where it is not known, and `statistics` then gives the gradients of the objective as they are:
        the model made no loss of its labels that the backward pass went through, and `sample_losses` was not
        called.
        """
        return self._last().factors

    def sample_losses(self, losses: Tensor) -> Tensor:
        """Tell what each sample's own loss is [S], so that its factor in the objective is known.

        Call it between the forward and the backward pass, on what the objective is then computed from, and
        go on with what it returns, which is `losses`.
        """
        if tuple(losses.shape) != (self.num_samples,):
            raise ConfigError(
                f"sample_losses: shape {tuple(losses.shape)}; allowed: ({self.num_samples},), one a sample"
            )
        self._last().watch_losses(losses)
        return losses

    def statistics(self, weights: Tensor | Sequence[float] | None = None) -> dict[str, Statistics]:
        """Statistics of every target for the S samples of the last backward pass.

        Args:
            weights: what each sample's loss was multiplied by in the objective [S], where `factors` does not
                know it.

        Raises ConfigError when there was no backward pass, or it did not reach a target.
        """
        batch = self._last()
        if not batch.reached:
            raise ConfigError("record: no backward pass has followed the last forward pass")
        inputs, factors = batch.inputs, batch.factors
        if weights is not None:
            factors = torch.as_tensor(weights, dtype=torch.float64, device=inputs.device)
        if factors is None:
            factors = torch.ones(batch.num_samples, dtype=torch.float64, device=inputs.device)
        elif inputs.labels is not None:
            # A sample without labels has a gradient of zero, whatever it is divided by.
            factors = torch.where(inputs.labels.counts == 0, 1.0, factors)
        return self._recorder.finish(self._head_result(batch, factors))

    def _head_result(self, batch: RecordedBatch, factors: Tensor) -> HeadResult:
        result, linear = batch.fused_head, self._linear_head
        if result is None:
            if linear is not None and not linear.reached:
                raise ConfigError(
                    f"record: no gradient reached {self._anatomy.head_name} in the backward pass"
                )
            result = HeadResult() if linear is None else linear.result(1 / factors)
            result.losses = torch.zeros_like(factors)
        result.factors = factors
        return result

    def _last(self) -> RecordedBatch:
        if self._batch is None:
            raise ConfigError("record: no forward pass with gradients has run yet")
        return self._batch

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._reading or not torch.is_grad_enabled():
            return
        self._end_batch()
        if self._batch is not None:
            self._batch.supersede()
        inputs = read_inputs(module, args, kwargs)
        self._batch = RecordedBatch(inputs, check=not self._checked)
        self._open.enter_context(self._recorder.batch(inputs.layout))
        if self._is_fused(inputs):
            assert self._fused_head is not None
            self._fused_head.armed = True
        elif self._linear_head is not None:
            self._open.enter_context(self._linear_head.batch(inputs, self._kept_ids(inputs)))

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._reading or not torch.is_grad_enabled():
            return
        batch = self._last()
        if self._is_fused(batch.inputs):
            assert self._fused_head is not None and batch.inputs.labels is not None
            kept_ids = self._kept_ids(batch.inputs)
            batch.fused_head = self._fused_head.run(batch.inputs.labels, kept_ids, self._recorder.needs_head)
            batch.fused_dtype = self._fused_head.dtype
        batch.watch_output(output)
        self._checked = True

    def _is_fused(self, inputs: Inputs) -> bool:
        return inputs.labels is not None and inputs.labels.fused and self._fused_head is not None

    def _kept_ids(self, inputs: Inputs) -> tuple[Tensor, ...] | None:
        """Each sample's distinct token ids, whose rows a tied weight's two gradients share."""
        if not self._recorder.needs_tied:
            return None
        if inputs.ids_ST is None:
            raise ConfigError("record: the target 'tied' needs input_ids, and the model gets embeddings")
        ids_ST = inputs.ids_ST.cpu().numpy()
        tokens = list(ids_ST)
        if inputs.real_ST is not None:
            tokens = [ids[real] for ids, real in zip(ids_ST, inputs.real_ST.cpu().numpy(), strict=True)]
        return distinct_ids(tokens, self._anatomy.embedding.padding_idx, inputs.device)

    def _end_batch(self) -> None:
        self._open.close()
        self._open = ExitStack()


def _resolve(wanted: Sequence[str] | Mapping[str, str], anatomy: Anatomy) -> Targets:
    try:
        targets = resolve_targets(wanted, anatomy)
    except ConfigError as error:
        raise ConfigError(str(error).replace("probe.targets", "targets")) from None
    for name, parameters in targets.members.items():
        if not parameters:
            kind = type(anatomy.model).__name__
            raise ConfigError(f"targets: {name!r} needs a causal language model, not {kind}; use patterns")
    return targets
