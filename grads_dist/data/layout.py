"""The files of a token store, and how they are written: chunk by chunk, then joined."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grads_dist.data.encode import EncodedRow
from grads_dist.data.rows import RowError

META = "meta.json"
REJECTED = "rejected.jsonl"
# name -> dtype of the flat arrays; `tokens` and `loss` lie row after row, `id_bytes` holds the ids as UTF-8.
ARRAYS: dict[str, np.dtype] = {
    "tokens": np.dtype(np.int32),
    "loss": np.dtype(np.uint8),
    "index": np.dtype(np.int64),
    "num_tokens": np.dtype(np.int32),
    "num_label_tokens": np.dtype(np.int32),
    "token_hash": np.dtype(np.int64),
    "id_bytes": np.dtype(np.uint8),
    "id_lengths": np.dtype(np.int32),
}
# Offsets, written when the chunks are joined: name -> the lengths that they sum.
OFFSETS = {"offsets": "num_tokens", "id_offsets": "id_lengths"}
_FLUSH_TOKENS = 1 << 20
_FLUSH_ROWS = 4096
_COPY_ROWS = 1 << 20


@dataclass
class Counts:
    """What became of the rows; counts of parts of a corpus add up."""

    num_rows: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    num_truncated: int = 0
    largest_token: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    """For each kind of rejection the first row and its reason."""

    def add(self, other: Counts) -> None:
        """Add the counts of a later part."""
        self.num_rows += other.num_rows
        self.num_tokens += other.num_tokens
        self.num_label_tokens += other.num_label_tokens
        self.num_truncated += other.num_truncated
        self.largest_token = max(self.largest_token, other.largest_token)
        self.rejected.update(other.rejected)
        self.examples = {**other.examples, **self.examples}

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps({f.name: getattr(self, f.name) for f in fields(self)}), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Counts:
        """The inverse of `save`."""
        content = json.loads(path.read_text(encoding="utf-8"))
        examples = {kind: (index, reason) for kind, (index, reason) in content.pop("examples").items()}
        return Counts(**{**content, "rejected": Counter(content["rejected"]), "examples": examples})


class ChunkWriter:
    """Writes the encoded rows of one contiguous part of the corpus to a folder, buffer by buffer."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.counts = Counts()
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in ARRAYS}
        self._rejected = (folder / REJECTED).open("w", encoding="utf-8")
        self._buffers: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
        self._buffered_tokens = 0

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for file in self._files.values():
            file.close()
        self._rejected.close()

    def add(self, index: int, row_id: str, row: EncodedRow) -> None:
        """Append a usable row."""
        name_bytes = row_id.encode("utf-8", "backslashreplace")
        values: dict[str, Any] = {
            "tokens": row.tokens,
            "loss": row.loss,
            "index": [index],
            "num_tokens": [len(row.tokens)],
            "num_label_tokens": [int(row.loss.sum())],
            "token_hash": [row.token_hash],
            "id_bytes": np.frombuffer(name_bytes, dtype=np.uint8),
            "id_lengths": [len(name_bytes)],
        }
        for name, value in values.items():
            self._buffers[name].append(np.asarray(value, dtype=ARRAYS[name]))
        counts = self.counts
        counts.num_rows += 1
        counts.num_tokens += len(row.tokens)
        counts.num_label_tokens += int(row.loss.sum())
        counts.num_truncated += row.is_truncated
        counts.largest_token = max(counts.largest_token, int(row.tokens.max()))
        self._buffered_tokens += len(row.tokens)
        if self._buffered_tokens >= _FLUSH_TOKENS or len(self._buffers["index"]) >= _FLUSH_ROWS:
            self._flush()

    def reject(self, index: int, error: RowError) -> None:
        """Record a row that cannot be used."""
        self._rejected.write(json.dumps({"index": index, "reason": error.reason}) + "\n")
        self.counts.rejected[error.kind] += 1
        self.counts.examples.setdefault(error.kind, (index, error.reason))

    def _flush(self) -> None:
        for name, arrays in self._buffers.items():
            if arrays:
                np.concatenate(arrays).tofile(self._files[name])
            arrays.clear()
        self._buffered_tokens = 0


def join_chunks(chunks: Sequence[Path], folder: Path) -> None:
    """Join the chunks, in order, into the .npy files of a store in `folder`."""
    for name, dtype in ARRAYS.items():
        sizes = [(chunk / name).stat().st_size for chunk in chunks]
        with (folder / f"{name}.npy").open("wb") as target:
            _write_header(target, dtype, sum(sizes) // dtype.itemsize)
            for chunk in chunks:
                with (chunk / name).open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 22)
    for name, lengths in OFFSETS.items():
        summed = np.load(folder / f"{lengths}.npy", mmap_mode="r", allow_pickle=False)
        _write_offsets(folder / f"{name}.npy", summed)
    (folder / "id_lengths.npy").unlink()
    with (folder / REJECTED).open("wb") as target:
        for chunk in chunks:
            with (chunk / REJECTED).open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 22)


def _write_header(target: BinaryIO, dtype: np.dtype, size: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(target, header)


def _write_offsets(path: Path, lengths: np.ndarray) -> None:
    """int64[len(lengths) + 1], the running sum from 0."""
    with path.open("wb") as target:
        _write_header(target, np.dtype(np.int64), len(lengths) + 1)
        last = np.zeros(1, dtype=np.int64)
        last.tofile(target)
        for start in range(0, len(lengths), _COPY_ROWS):
            sums = last[0] + np.cumsum(lengths[start : start + _COPY_ROWS], dtype=np.int64)
            sums.tofile(target)
            last = sums[-1:]
