"""The LM head inside someone else's forward pass: an ordinary linear layer, or TRL's fused one.

Shape legend: S samples, T tokens, n label positions of one sample, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from grads_dist.library.inputs import Inputs, Labels
from grads_dist.model.anatomy import Anatomy
from grads_dist.stats.gradients import OuterProduct, SampleGradient
from grads_dist.stats.head_pass import HeadPass
from grads_dist.stats.head_request import HeadRequest, HeadResult
from grads_dist.stats.layers import LayerReader
from grads_dist.stats.ops import accumulation_dtype, outer_product_stats, ragged_row_stats
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics

CHUNK_BYTES = 256 << 20
"""Memory for the logits of TRL's fused head at any moment."""


class LinearHead:
    """Reads the LM head as a linear layer, at the positions that can have a gradient.

    With `kept_ids`, as a tied weight needs them, each sample's rows of those tokens are kept apart.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        weight = f"{anatomy.head_name}.weight"
        names = {weight} | ({f"{anatomy.head_name}.bias"} if anatomy.head.bias is not None else set())
        self._weight = weight
        self._reader = LayerReader(anatomy.model, names, self._consume)
        self._kept_ids: tuple[Tensor, ...] | None = None
        self._found = HeadResult()

    @contextmanager
    def batch(self, inputs: Inputs, kept_ids: tuple[Tensor, ...] | None) -> Iterator[None]:
        """Read the passes inside the block as those of one batch."""
        self._kept_ids, self._found = kept_ids, HeadResult()
        layout = inputs.layout if inputs.labels is None else inputs.labels.layout
        with self._reader.batch(layout):
            yield

    def result(self, inverse_S: Tensor) -> HeadResult:
        """What the last batch's backward pass found, each sample times `inverse_S`."""
        found = self._found
        rows = [rows * f.to(rows.dtype) for rows, f in zip(found.kept_rows, inverse_S, strict=False)]
        return replace(
            found,
            weight_stats=_scaled(found.weight_stats, inverse_S),
            bias_stats=_scaled(found.bias_stats, inverse_S),
            rest_stats=_scaled(found.rest_stats, inverse_S),
            kept_rows=rows,
        )

    @property
    def reached(self) -> bool:
        """Whether the last batch's backward pass came by."""
        return self._found.weight_stats is not None

    def detach(self) -> None:
        """Leave the head as it was."""
        self._reader.detach()

    def _consume(self, parameter: str, gradient: SampleGradient) -> None:
        if parameter != self._weight:
            self._found.bias_stats = gradient.statistics()
        elif self._kept_ids is None:
            self._found.weight_stats = gradient.statistics()
        else:
            assert isinstance(gradient, OuterProduct)
            self._split(gradient, self._kept_ids)

    def _split(self, gradient: OuterProduct, kept_ids: tuple[Tensor, ...]) -> None:
        offsets, rest = gradient.segments.offsets, []
        for sample, ids in enumerate(kept_ids):
            rows = slice(offsets[sample], offsets[sample + 1])
            b_nV, a_nD = gradient.b_NP[rows], gradient.a_ND[rows]
            others = torch.ones(b_nV.shape[1], dtype=torch.bool, device=b_nV.device)
            others[ids] = False
            rest.append(outer_product_stats(b_nV[:, others], a_nD, Segments((b_nV.shape[0],))))
            dtype = accumulation_dtype(b_nV.dtype)
            self._found.kept_rows.append(b_nV[:, ids].t().to(dtype) @ a_nD.to(dtype))
        self._found.rest_stats = Statistics.concatenate(rest)
        kept = Segments(tuple(len(ids) for ids in kept_ids))
        kept_stats = ragged_row_stats(torch.cat(self._found.kept_rows), kept)
        self._found.weight_stats = self._found.rest_stats.merge(kept_stats)


class FusedHead:
    """Reads TRL's fused LM head, which multiplies by the head's weight without calling the head.

    The engine's own pass over the label positions computes its gradient again, from the last hidden state.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._hidden_STD: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._handle = anatomy.body.register_forward_hook(self._keep)
        self.armed = False

    @torch.no_grad()
    def run(self, labels: Labels, kept_ids: tuple[Tensor, ...] | None, with_stats: bool) -> HeadResult:
        """Losses, el2n and statistics of the last forward pass."""
        self.armed = False
        assert self._hidden_STD is not None and self._dtype is not None
        carries, head = labels.carries, self._anatomy.head
        hidden_MD, self._hidden_STD = self._hidden_STD[carries].to(self._dtype), None
        result = HeadResult()
        with _whole(head):
            bias = None if head.bias is None else head.bias.to(self._dtype)
            element = 8 if self._dtype == torch.float64 else 4
            request = HeadRequest(
                segments=labels.layout.segments,
                sample_weights=torch.ones_like(labels.counts),
                transform=self._anatomy.transform,
                chunk_positions=max(1, CHUNK_BYTES // (element * self._anatomy.vocab_size)),
                with_stats=with_stats,
                kept_ids=kept_ids,
            )
            HeadPass(
                hidden_MD, head.weight.to(self._dtype), bias, labels.targets_ST[carries], request, result
            ).run()
        return _zero_without_labels(result, labels)

    @property
    def dtype(self) -> torch.dtype:
        """What the last forward pass' logits were computed in, at most float32."""
        return torch.float32 if self._dtype in (None, torch.float64) else self._dtype

    def detach(self) -> None:
        """Leave the model as it was."""
        self._handle.remove()

    def _keep(self, _: nn.Module, args: tuple, output: Any) -> None:
        if not self.armed:
            return
        hidden = output.last_hidden_state.detach()
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        self._hidden_STD = hidden
        self._dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype


def _zero_without_labels(result: HeadResult, labels: Labels) -> HeadResult:
    """A sample without label positions has a gradient of zero; the pass divides by their number."""
    lengths = labels.layout.segments.lengths
    if all(lengths):
        return result
    rows = [rows if n else torch.zeros_like(rows) for rows, n in zip(result.kept_rows, lengths, strict=False)]
    empty_S = labels.counts == 0
    return replace(
        result,
        weight_stats=_zero_where(result.weight_stats, empty_S),
        bias_stats=_zero_where(result.bias_stats, empty_S),
        rest_stats=_zero_where(result.rest_stats, empty_S),
        kept_rows=rows,
    )


def _zero_where(stats: Statistics | None, empty_S: Tensor) -> Statistics | None:
    if stats is None:
        return None
    return Statistics(**{f.name: getattr(stats, f.name).masked_fill(empty_S, 0) for f in fields(stats)})


def _scaled(stats: Statistics | None, factor_S: Tensor) -> Statistics | None:
    return None if stats is None else stats.scaled(factor_S)


def _whole(head: nn.Module) -> Any:
    """The head's weight in full, also where ZeRO-3 keeps a shard of it here."""
    absent = [
        p for p in head.parameters() if getattr(getattr(p, "ds_status", None), "name", "") == "NOT_AVAILABLE"
    ]
    if not absent:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(absent)
