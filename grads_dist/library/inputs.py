"""What a forward pass is called with: where the samples are, and which of their tokens carry loss.

Shape legend: S samples, T tokens (padding included).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.library.unwrap import is_causal_lm
from grads_dist.stats.segments import BatchLayout

IGNORED = -100
"""Label of a position that carries no loss."""

PACKED = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k")
"""Arguments that say where the samples of a packed row begin."""


@dataclass(frozen=True)
class Labels:
    """Which positions carry loss.

    Args:
        targets_ST: the token that each position predicts, int64; IGNORED where it carries no loss.
        layout: the label positions of every sample.
        num_items: what the model divides the summed loss by; None for the number of label positions.
        fused: whether the model was given TRL's LM head, which makes log-probabilities without logits.
    """

    targets_ST: Tensor
    layout: BatchLayout
    num_items: Tensor | int | None
    fused: bool

    @property
    def carries(self) -> Tensor:
        """True at label positions."""
        return self.targets_ST != IGNORED

    @property
    def counts(self) -> Tensor:
        """Label tokens of every sample, float64 [S]."""
        return self.layout.segments.lengths_tensor(self.targets_ST.device).double()

    def shares(self) -> Tensor:
        """Weight of each sample's mean loss in the loss that the model makes of its labels, float64 [S]."""
        counts = self.counts
        if self.num_items is None:
            return counts / counts.sum()
        return counts / torch.as_tensor(self.num_items, dtype=torch.float64, device=counts.device)


@dataclass(frozen=True)
class Inputs:
    """One forward pass' samples.

    Args:
        layout: the real tokens of every sample.
        ids_ST: token ids; None where the module gets none.
        real_ST: true at real tokens; None where all are.
        labels: None where the module is given none.
    """

    layout: BatchLayout
    device: torch.device
    ids_ST: Tensor | None = None
    real_ST: Tensor | None = None
    labels: Labels | None = None


def read_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Inputs:
    """The samples of a call of `module`: rows of tokens for a causal language model, else the leading axis.

    Raises ConfigError when the call has no batch axis, or packs several samples into a row.
    """
    given = _by_name(module, args, kwargs)
    if is_causal_lm(module):
        _refuse_router_loss(module, given)
        return _read_tokens(given)
    first = next((x for x in given.values() if isinstance(x, Tensor) and x.dim()), None)
    if first is None:
        raise ConfigError(f"record: {type(module).__name__} is called without a tensor that has samples")
    return Inputs(_generic_layout(type(module).__name__, first), first.device)


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return dict(zip(names, args, strict=False)) | kwargs


def _generic_layout(kind: str, x: Tensor) -> BatchLayout:
    """Tokens are the second axis of ids [S, T] and of features [S, T, D]; features [S, D] have none."""
    has_tokens = x.dim() > 2 or (x.dim() == 2 and not x.is_floating_point())
    samples, length = x.shape[0], x.shape[1] if has_tokens else 1
    if samples == length > 1:
        raise ConfigError(
            f"record: {kind} gets a batch of {samples} samples of {length} tokens, whose axes cannot be told "
            f"apart; allowed: another batch size"
        )
    return BatchLayout((length,) * samples, length)


def _read_tokens(given: dict[str, Any]) -> Inputs:
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ConfigError("record: the model is called with neither input_ids nor inputs_embeds")
    shape, device = tuple(tokens.shape[:2]), tokens.device
    real_ST = _real_tokens(given.get("attention_mask"), shape)
    _refuse_packing(given, real_ST)
    targets_ST = _targets(given, shape)
    counted = torch.ones(shape, dtype=torch.bool, device=device) if real_ST is None else real_ST
    layout = BatchLayout.from_mask(counted)
    labels = None
    if targets_ST is not None:
        carries = targets_ST != IGNORED
        if real_ST is not None and bool((carries & ~real_ST).any()):
            raise ConfigError(
                "record: a label is predicted from padding, and the gradient would depend on it; set "
                "the labels of padding, and of a row's first token, to -100"
            )
        fused = bool(given.get("fused_lm_head"))
        labels = Labels(targets_ST, BatchLayout.from_mask(carries), given.get("num_items_in_batch"), fused)
    return Inputs(layout, device, given.get("input_ids"), real_ST, labels)


def _real_tokens(mask: Any, shape: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape or bool((mask > 1).any()):
        raise ConfigError(
            "record: attention_mask is not 1 at the tokens of a row and 0 at its padding; several samples in "
            "one row cannot be told apart"
        )
    return mask.bool()


def _refuse_packing(given: dict[str, Any], real_ST: Tensor | None) -> None:
    found = next((name for name in PACKED if given.get(name) is not None), None)
    positions = given.get("position_ids")
    if found is None and isinstance(positions, Tensor) and positions.dim() == 2:
        falls = positions[:, 1:] <= positions[:, :-1]
        if real_ST is not None:
            falls = falls & real_ST[:, 1:] & real_ST[:, :-1]
        found = "position_ids that restart" if bool(falls.any()) else None
    if found is not None:
        raise ConfigError(
            f"record: {found}: several samples are packed into one row, and their gradients cannot be told "
            f"apart; allowed: one sample a row, padded"
        )
    if given.get("shift_labels") is not None:
        raise ConfigError("record: shift_labels: sequence and context parallelism cannot be read")


def _refuse_router_loss(module: Any, given: dict[str, Any]) -> None:
    asked = given.get("output_router_logits")
    if asked is None:
        asked = getattr(module.config.get_text_config(), "output_router_logits", False)
    if asked and given.get("labels") is not None:
        raise ConfigError(
            "record: output_router_logits: the router's balance loss couples the samples of a batch; leave "
            "it out"
        )


def _targets(given: dict[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Position t predicts token t + 1."""
    labels = given.get("labels")
    if labels is None:
        return None
    if tuple(labels.shape) != shape:
        raise ConfigError(f"record: labels of shape {tuple(labels.shape)} for tokens of shape {shape}")
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
