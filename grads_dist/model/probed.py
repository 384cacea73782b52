"""A causal language model whose forward pass is the probe's objective instead of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from grads_dist.model.anatomy import Anatomy
from grads_dist.stats.head import HeadLoss
from grads_dist.stats.head_request import HeadRequest, HeadResult
from grads_dist.stats.recorder import Recorder, distinct_ids
from grads_dist.stats.segments import BatchLayout, Segments


@dataclass(frozen=True)
class Batch:
    """A right-padded micro-batch of S samples and T tokens.

    Args:
        rows: positions of the samples in the token store, int64 [S]; empty for a dummy batch.
        input_ids, position_ids: int64 [S, T].
        token_mask: bool [S, T], true at real tokens.
        loss_mask: bool [S, T], true at tokens that carry loss; never at the first.
        weights: weight of each sample's loss in the total, float64 [S].
        layout: real lengths of the samples.
        tokens: the samples' token ids on the host, without padding.
        label_slots: int64 [M], where in [S, T - 1] the positions are that predict a token that carries loss.
        num_label_tokens: tokens that carry loss, a sample; M in all.

    What is known on the host is kept there: to ask a GPU for it, the host would wait for all work before.
    """

    rows: Tensor
    input_ids: Tensor
    position_ids: Tensor
    token_mask: Tensor
    loss_mask: Tensor
    weights: Tensor
    layout: BatchLayout
    tokens: tuple[np.ndarray, ...]
    label_slots: Tensor
    num_label_tokens: tuple[int, ...]


class ProbedModel(nn.Module):
    """Runs a causal language model's body, then its head's loss on the label positions alone.

    `forward` returns the weighted sum of the samples' losses; what else the pass found lies in `head_result`
    and `features` until the next one. Full logits are never formed.

    Args:
        anatomy: the model and its parts.
        recorder: reads statistics of the passes made with `record=True`; None to train or featurise only.
        head_chunk_bytes: memory for the logits at any moment.
    """

    def __init__(self, anatomy: Anatomy, recorder: Recorder | None, head_chunk_bytes: int) -> None:
        super().__init__()
        self.causal_lm = anatomy.model
        self.recorder = recorder
        self.head_result: HeadResult | None = None
        self.features: Tensor | None = None
        self._anatomy = [anatomy]  # in a list: its modules are children of causal_lm already
        element = 8 if anatomy.head.weight.dtype == torch.float64 else 4
        self._chunk_positions = max(1, head_chunk_bytes // (element * anatomy.vocab_size))

    @property
    def anatomy(self) -> Anatomy:
        """The model and its parts."""
        return self._anatomy[0]

    def fuse_head(self) -> None:
        """Make the LM head's forward compute the loss; from here on the model yields no logits.

        ZeRO-3 gathers a weight for as long as its module's own forward runs, so the loss must run in there.
        """
        self.anatomy.head.forward = self._head_forward  # type: ignore[assignment, method-assign]

    def forward(
        self, batch: Batch, record: bool = False, feature_tokens: str | None = None, loss: bool = True
    ) -> Tensor:
        """Weighted sum of the samples' losses, a scalar; with `loss=False` a zero, and features only.

        Args:
            record: also compute the statistics of the head's gradient, for the recorder.
            feature_tokens: "label" or "all": average the last hidden state over those tokens into `features`.
        """
        output = self.anatomy.body(
            input_ids=batch.input_ids,
            # Padding is on the right, where no real token of a causal model looks. Masking it would leave
            # padded queries of a sliding window without any key, and their NaN would reach real tokens.
            attention_mask=torch.ones_like(batch.input_ids),
            position_ids=batch.position_ids,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state
        self.features = _content(hidden.detach(), batch, feature_tokens) if feature_tokens else None
        if not loss:
            return hidden.new_zeros(())
        # Position t predicts token t + 1: label positions are those before the tokens that carry loss.
        hidden_MD = hidden[:, :-1].flatten(0, 1).index_select(0, batch.label_slots)
        targets_M = batch.input_ids[:, 1:].flatten().index_select(0, batch.label_slots)
        self.head_result = HeadResult()
        return self.anatomy.head(hidden_MD, targets_M, self._request(batch, record), self.head_result)

    def _request(self, batch: Batch, record: bool) -> HeadRequest:
        kept_ids = None
        if record and self.recorder is not None and self.recorder.needs_tied:
            padding_idx = self.anatomy.embedding.padding_idx
            kept_ids = distinct_ids(batch.tokens, padding_idx, batch.input_ids.device)
        return HeadRequest(
            segments=Segments(batch.num_label_tokens),
            sample_weights=batch.weights,
            transform=self.anatomy.transform,
            chunk_positions=self._chunk_positions,
            with_stats=record and self.recorder is not None and self.recorder.needs_head,
            kept_ids=kept_ids,
            extremes=self.recorder is None or self.recorder.extremes,
            projections=self.recorder.head_projections if record and self.recorder is not None else None,
        )

    def _head_forward(
        self, hidden_MD: Tensor, targets_M: Tensor, request: HeadRequest, result: HeadResult
    ) -> Tensor:
        head = self.anatomy.head
        return HeadLoss.apply(hidden_MD, head.weight, head.bias, targets_M, request, result)


def _content(hidden_STD: Tensor, batch: Batch, tokens: str) -> Tensor:
    """Mean last hidden state over the tokens that carry loss (or over all real tokens), float32 [S, D]."""
    mask = batch.loss_mask if tokens == "label" else batch.token_mask
    weights = mask / mask.sum(1, keepdim=True)
    # What lies at padded positions may be anything, and 0 times NaN is NaN.
    hidden_STD = hidden_STD.float().masked_fill(~mask[:, :, None], 0)
    return torch.einsum("std,st->sd", hidden_STD, weights.float())
