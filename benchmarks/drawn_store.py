"""A token store of drawn tokens: what a rank needs of a corpus, without tokenizing one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from grads_dist.data.layout import META, REJECTED
from grads_dist.data.store import SCHEMA

MEDIAN_TOKENS, MOST_TOKENS, VOCAB_SIZE = 90, 2048, 8000
_BLOCK_TOKENS = 1 << 24


def make_store(folder: Path, num_rows: int, seed: int = 0) -> Path:
    """Write a store of rows of log-normal length; half of each carries loss, its id is its number."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), 0.5, num_rows), 2, MOST_TOKENS).astype(np.int32)
    offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
    ids = np.char.zfill(np.arange(num_rows).astype("S9"), 9)
    arrays = {
        "index": np.arange(num_rows),
        "num_tokens": lengths,
        "num_label_tokens": lengths - lengths // 2,
        "token_hash": rng.integers(-(2**63), 2**63, num_rows),
        "id_bytes": ids.view(np.uint8),
        "id_offsets": 9 * np.arange(num_rows + 1),
        "offsets": offsets,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    _write_tokens(folder, offsets, lengths, rng)
    counts = {"num_rows": num_rows, "num_truncated": 0, "num_rejected": 0}
    meta = {"schema": SCHEMA, **counts, "pad_token_id": 0, "vocab_size": VOCAB_SIZE}
    (folder / REJECTED).touch()
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")
    return folder


def _write_tokens(folder: Path, offsets: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> None:
    total = int(offsets[-1])
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.int32, (total,))
    loss = np.lib.format.open_memmap(folder / "loss.npy", "w+", np.uint8, (total,))
    for start in range(0, total, _BLOCK_TOKENS):
        block = slice(start, min(start + _BLOCK_TOKENS, total))
        tokens[block] = rng.integers(0, VOCAB_SIZE, block.stop - block.start, dtype=np.int32)
        place = np.arange(block.start, block.stop)
        row = np.searchsorted(offsets, place, side="right") - 1
        loss[block] = place - offsets[row] >= lengths[row] // 2
    tokens.flush()
    loss.flush()
