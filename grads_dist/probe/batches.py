"""Rows of the token store as right-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from grads_dist.model.probed import Batch
from grads_dist.stats.segments import BatchLayout


class TokenSource(Protocol):
    """What a batch is made from; `grads_dist.data.store.TokenStore` is one."""

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of row i, int32 [T_i]."""
        ...

    def loss_mask(self, i: int) -> np.ndarray:
        """Which tokens of row i carry loss, bool [T_i]."""
        ...


PAD_ID = 0
"""What stands at padded positions, where no real token looks: any id of the vocabulary will do."""


def collate(
    source: TokenSource,
    rows: Sequence[int] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    device: torch.device,
    avoid: frozenset[int] = frozenset(),
) -> Batch:
    """The batch of the given rows, each loss multiplied by its weight in the batch's total.

    Args:
        avoid: padded lengths not to use, such as numbers of heads, so that axes of tokens and of heads can be
            told apart by their size.
    """
    tokens = [source.tokens(int(i)) for i in rows]
    lengths = tuple(len(t) for t in tokens)
    padded = max(lengths)
    while padded in avoid:
        padded += 1
    shape = (len(tokens), padded)
    input_ids = np.full(shape, PAD_ID, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    for s, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        input_ids[s, : lengths[s]] = ids
        loss_mask[s, : lengths[s]] = source.loss_mask(int(row))
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    token_mask = positions < np.asarray(lengths)[:, None]
    return Batch(
        rows=torch.as_tensor(np.asarray(rows, dtype=np.int64)),
        input_ids=torch.from_numpy(input_ids).to(device),
        position_ids=torch.from_numpy(positions.copy()).to(device),
        token_mask=torch.from_numpy(token_mask).to(device),
        loss_mask=torch.from_numpy(loss_mask).to(device),
        weights=torch.as_tensor(np.asarray(weights, dtype=np.float64), device=device),
        layout=BatchLayout(lengths, shape[1]),
    )


def dummy_batch(device: torch.device) -> Batch:
    """Two tokens of weight 0, for a rank that has nothing to do while the others communicate."""
    return Batch(
        rows=torch.empty(0, dtype=torch.int64),
        input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device),
        position_ids=torch.arange(2, device=device)[None],
        token_mask=torch.ones(1, 2, dtype=torch.bool, device=device),
        loss_mask=torch.tensor([[False, True]], device=device),
        weights=torch.zeros(1, dtype=torch.float64, device=device),
        layout=BatchLayout((2,), 2),
    )


def rehearsal_batch(num_rows: int, num_tokens: int, vocab_size: int, device: torch.device) -> Batch:
    """Rows of made-up tokens, all of which carry loss and few of which repeat, of no weight in the total."""
    ids = torch.arange(num_rows * num_tokens, device=device).reshape(num_rows, num_tokens) % vocab_size
    loss_mask = torch.ones_like(ids, dtype=torch.bool)
    loss_mask[:, 0] = False
    return Batch(
        rows=torch.empty(0, dtype=torch.int64),
        input_ids=ids,
        position_ids=torch.arange(num_tokens, device=device).expand(num_rows, -1).contiguous(),
        token_mask=torch.ones_like(loss_mask),
        loss_mask=loss_mask,
        weights=torch.zeros(num_rows, dtype=torch.float64, device=device),
        layout=BatchLayout((num_tokens,) * num_rows, num_tokens),
    )
