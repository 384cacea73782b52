"""Rows of the token store as right-padded batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from grads_dist.model.probed import Batch
from grads_dist.stats.segments import BatchLayout
from grads_dist.stats.tensors import to_device


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
    tokens = tuple(source.tokens(int(i)) for i in rows)
    masks = [source.loss_mask(int(i)) for i in rows]
    padded = max(map(len, tokens))
    while padded in avoid:
        padded += 1
    return _batch(np.asarray(rows, dtype=np.int64), tokens, masks, np.asarray(weights), padded, device)


def dummy_batch(device: torch.device) -> Batch:
    """Two tokens of weight 0, for a rank that has nothing to do while the others communicate."""
    return rehearsal_batch(1, 2, 1, device)


def rehearsal_batch(num_rows: int, num_tokens: int, vocab_size: int, device: torch.device) -> Batch:
    """Rows of made-up tokens, all of which carry loss and few of which repeat, of no weight in the total."""
    ids = np.arange(num_rows * num_tokens).reshape(num_rows, num_tokens) % vocab_size
    loss_mask = np.arange(num_tokens) > 0
    no_rows, weights = np.empty(0, dtype=np.int64), np.zeros(num_rows)
    return _batch(no_rows, tuple(ids), [loss_mask] * num_rows, weights, num_tokens, device)


def check_batch(vocab_size: int, avoid: frozenset[int], weight: float, device: torch.device) -> Batch:
    """Two rows of a few made-up tokens that are read like rows of the corpus; `avoid` as for `collate`."""
    num_tokens = next(length for length in itertools.count(4) if length not in avoid)
    ids = np.arange(2 * num_tokens).reshape(2, num_tokens) % vocab_size
    loss_mask = np.arange(num_tokens) > 0
    return _batch(np.arange(2), tuple(ids), [loss_mask] * 2, np.full(2, weight), num_tokens, device)


def _batch(
    rows: np.ndarray,
    tokens: tuple[np.ndarray, ...],
    masks: Sequence[np.ndarray],
    weights: np.ndarray,
    padded_length: int,
    device: torch.device,
) -> Batch:
    """The batch of these samples, padded on the right; nothing is waited for on the way to the device."""
    lengths = tuple(map(len, tokens))
    shape = (len(tokens), padded_length)
    input_ids = np.full(shape, PAD_ID, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    for s, (ids, mask) in enumerate(zip(tokens, masks, strict=True)):
        input_ids[s, : lengths[s]] = ids
        loss_mask[s, : lengths[s]] = mask
    positions = np.broadcast_to(np.arange(padded_length), shape)
    token_mask = positions < np.asarray(lengths)[:, None]
    return Batch(
        rows=torch.from_numpy(rows),
        input_ids=to_device(input_ids, torch.int64, device),
        position_ids=to_device(positions, torch.int64, device),
        token_mask=to_device(token_mask, torch.bool, device),
        loss_mask=to_device(loss_mask, torch.bool, device),
        weights=to_device(weights, torch.float64, device),
        layout=BatchLayout(lengths, padded_length),
        tokens=tokens,
        label_slots=to_device(np.flatnonzero(loss_mask[:, 1:]), torch.int64, device),
        num_label_tokens=tuple(loss_mask.sum(1).tolist()),
    )
