"""One forward pass and its backward pass: the samples' losses, and their factors in the objective.

Shape legend: S samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from grads_dist.errors import ConfigError
from grads_dist.library.inputs import Inputs, Labels
from grads_dist.library.losses import (
    SampleError,
    check_logit_gradient,
    check_model_loss,
    factors_of,
    losses_of,
    sample_error,
)
from grads_dist.stats.head_request import HeadResult


class RecordedBatch:
    """What hooks on the outputs of one forward pass learn.

    Args:
        inputs: its samples.
        check: whether its loss is compared with what the factors suppose of it.
    """

    def __init__(self, inputs: Inputs, check: bool) -> None:
        self.inputs = inputs
        self.losses: Tensor | None = None
        self.el2n: Tensor | None = None
        self.fused_head: HeadResult | None = None
        self.fused_dtype = torch.float32
        self.reached = False
        self._check, self._closed, self._superseded = check, False, False
        self._factors: Tensor | None = None
        self._loss_gradient: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """S."""
        return self.inputs.layout.num_samples

    @property
    def factors(self) -> Tensor | None:
        """What each sample's mean loss was multiplied by, float64 [S]; None where it is not known."""
        labels = self.inputs.labels
        if self._factors is None and self._loss_gradient is not None and labels is not None:
            return self._loss_gradient * labels.shares()
        return self._factors

    def close(self) -> None:
        """A later backward pass changes nothing any more."""
        self._closed = True

    def supersede(self) -> None:
        """Another forward pass begins: a backward pass of this one would be taken for one of that."""
        self._superseded = True

    def watch_output(self, output: Any) -> None:
        """Learn from the outputs when a backward pass comes by, and what loss was made of the labels."""
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._arrive)
        labels = self.inputs.labels
        if labels is None:
            return
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if self.fused_head is not None:
            self._watch_log_probs(output, labels, self.fused_head)
        elif loss is not None and logits is not None:
            with torch.no_grad():
                self.losses, self.el2n = losses_of(logits, labels)
                if self._check:
                    # Some models form it in the 16 bits of their logits.
                    coarse = loss.dtype if loss.dtype.itemsize == 2 else torch.float32
                    check_model_loss(loss, self.losses, labels, coarse)
            if loss.requires_grad:
                loss.register_hook(self._take_loss_gradient)
                if self._check and logits.requires_grad:
                    logits.register_hook(self._compare_with(sample_error(logits.detach(), labels), labels))
        else:
            raise ConfigError(
                "record: the model is given labels and returns no output with a loss and logits; allowed: "
                "return_dict=True"
            )

    def watch_losses(self, losses: Tensor) -> None:
        """Learn each sample's factor from the gradient at its loss [S]."""
        losses.register_hook(self._take_factors)

    def _compare_with(self, expected: SampleError | None, labels: Labels) -> Callable[[Tensor], None]:
        """A hook on the logits that refuses a gradient which is not the loss' alone."""

        def compare(gradient: Tensor) -> None:
            if expected is not None and self._loss_gradient is not None and not self._closed:
                check_logit_gradient(gradient, expected, self._loss_gradient * labels.shares())

        return compare

    def _watch_log_probs(self, output: Any, labels: Labels, head: HeadResult) -> None:
        self.losses, self.el2n = head.losses, head.el2n
        if self._check:
            with torch.no_grad():
                check_model_loss(output.loss, head.losses, labels, self.fused_dtype)

        def take(gradient: Tensor) -> None:
            self._arrive(gradient)
            self._factors = factors_of(gradient, labels, self._check)

        output.log_probs.register_hook(take)

    def _arrive(self, _: Tensor) -> None:
        if self._superseded and not self._closed:
            raise ConfigError(
                "record: a backward pass came by of a forward pass that is not the last; allowed: one "
                "forward and one backward pass at a time"
            )
        self.reached = self.reached or not self._closed

    def _take_factors(self, gradient: Tensor) -> None:
        self._arrive(gradient)
        if not self._closed:
            self._factors = gradient.double().clone()

    def _take_loss_gradient(self, gradient: Tensor) -> None:
        self._arrive(gradient)
        if not self._closed:
            self._loss_gradient = gradient.double().clone()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
