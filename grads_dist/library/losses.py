"""Each sample's own loss, from the logits or TRL's log-probabilities, and what the objective makes of it.

Shape legend: S samples, T tokens, n label positions of one sample, V vocabulary.
"""

from __future__ import annotations

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
