"""Each sample's own loss, from the logits or TRL's log-probabilities, and what the objective makes of it.

Shape legend: S samples, T tokens, n label positions of one sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.library.inputs import Labels
from grads_dist.stats.ops import accumulation_dtype


def losses_of(logits_STV: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and el2n of every sample over its label tokens, in float32 or better [S].

    A sample without label tokens has NaN. One sample at a time, because a softmax over all would need the
    memory of the logits again.
    """
    losses, errors = [], []
    for logits_TV, targets_T in zip(logits_STV, labels.targets_ST, strict=True):
        positions = (targets_T != -100).nonzero().squeeze(1)
        targets_n = targets_T[positions, None]
        x_nV = logits_TV.index_select(0, positions)
        log_p = nn.functional.log_softmax(x_nV.to(accumulation_dtype(x_nV.dtype)), dim=1)
        losses.append(-log_p.gather(1, targets_n).mean())
        d_nV = log_p.exp_().scatter_add_(1, targets_n, -torch.ones_like(targets_n, dtype=log_p.dtype))
        errors.append(torch.linalg.vector_norm(d_nV, dim=1).mean())
    return torch.stack(losses), torch.stack(errors)


def check_model_loss(loss: Tensor, losses_S: Tensor, labels: Labels, dtype: torch.dtype) -> None:
    """Compare the loss that a model made of its labels with the weighted mean of the samples' losses.

    Args:
        loss: the model's.
        losses_S: the samples' own.
        labels: how each sample's loss is weighted.
        dtype: what one of them is computed in and the other is not.

    Raises ConfigError where something else is in it: a router's balance loss, label smoothing, a loss
    function of the model's own.
    """
    shares = labels.shares()
    expected = (losses_S.double().nan_to_num() * shares).sum()
    found = loss.detach().double()
    tolerance = 64 * torch.finfo(dtype).eps if dtype.itemsize > 2 else 4 * torch.finfo(dtype).eps
    if found.isfinite() and expected.isfinite() and (found - expected).abs() > tolerance * expected.abs():
        raise ConfigError(
            f"record: the model's loss is {found.item():.6g}, and the mean cross-entropy of its labels "
            f"{expected.item():.6g}: something else is in it, such as a router's balance loss; switch "
            f"that off"
        )


@dataclass(frozen=True)
class SampleError:
    """The gradient of one sample's mean loss at its logits, at some of its label positions.

    Args:
        sample: which one.
        positions: of the tokens, int64 [n].
        gradient: softmax minus one-hot over the sample's number of label tokens, float32 or better [n, V].
    """

    sample: int
    positions: Tensor
    gradient: Tensor


def sample_error(logits_STV: Tensor, labels: Labels, most: int = 16) -> SampleError | None:
    """That of the first sample with labels, at no more than `most` positions; None without labels."""
    sample = next((s for s, length in enumerate(labels.layout.segments.lengths) if length), None)
    if sample is None:
        return None
    targets_T = labels.targets_ST[sample]
    positions = (targets_T != -100).nonzero().squeeze(1)
    count, positions = len(positions), positions[:most]
    x_nV = logits_STV[sample].index_select(0, positions)
    d_nV = x_nV.to(accumulation_dtype(x_nV.dtype)).softmax(1)
    d_nV.scatter_add_(1, targets_T[positions, None], -torch.ones_like(d_nV[:, :1]))
    return SampleError(sample, positions, d_nV / count)


def check_logit_gradient(gradient_STV: Tensor, expected: SampleError, factors_S: Tensor) -> None:
    """Compare the objective's gradient at one sample's logits with the model's loss' alone.

    Raises ConfigError where another term goes through the logits: the statistics would be of both, divided
    by the factor of one.
    """
    found = gradient_STV[expected.sample].index_select(0, expected.positions).to(expected.gradient.dtype)
    loss_alone = expected.gradient * factors_S[expected.sample].to(expected.gradient.dtype)
    kind = torch.finfo(gradient_STV.dtype)
    # transformers forms a loss in float32 whatever the model's type.
    tolerance = 8 * kind.eps if gradient_STV.dtype.itemsize == 2 else 1024 * torch.finfo(torch.float32).eps
    difference, largest = (found - loss_alone).abs().max(), loss_alone.abs().max()
    # Below its smallest normal number float16 keeps few digits.
    if difference.isfinite() and difference > tolerance * largest + kind.tiny:
        raise ConfigError(
            "record: the gradient at the logits is not that of the model's loss alone: something else is "
            "computed of them, such as a distillation or z-loss; allowed: the sum of both, one a sample, "
            "through recording.sample_losses, and no labels for the model"
        )


def factors_of(log_prob_gradient: Tensor, labels: Labels, check: bool) -> Tensor:
    """What each sample's mean loss is multiplied by, from the gradient at TRL's log-probabilities [S, T - 1].

    Raises ConfigError, with `check`, where the tokens of a sample weigh differently, as in TRL's `dft` loss.
    """
    carries = labels.carries[:, : log_prob_gradient.shape[1]]
    gradient = log_prob_gradient.double().masked_fill(~carries, 0)
    factors = -gradient.sum(1)
    if check:
        even = -factors / labels.counts.clamp_min(1)
        difference = (gradient - even[:, None]).masked_fill(~carries, 0).abs().max()
        if difference > 1e-4 * even.abs().max():
            raise ConfigError(
                "record: the tokens of a sample have different weights in the objective (loss_type='dft'?); "
                "allowed: their mean cross-entropy"
            )
    return factors
