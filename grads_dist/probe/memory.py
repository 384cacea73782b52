"""Out of memory: told from other failures, answered by smaller batches, met before the work if it can be."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path

import numpy as np
import torch

from grads_dist.errors import GradsDistError, OutOfMemory
from grads_dist.probe.plan import Plan
from grads_dist.runtime.rundir import write_json
from grads_dist.table.notes import OUT_OF_MEMORY

log = logging.getLogger(__name__)

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says in a plain RuntimeError: of the CPU's allocator, of libraries on the GPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, the GPU's or the host's, did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release(device: torch.device) -> None:
    """Give back what a failed pass left behind; call it when its exception is gone, which holds tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def refusal(rows: np.ndarray, longest: int, batch_tokens: int, path: Path | None) -> GradsDistError:
    """The error for a batch that does not fit on a rank which cannot make it smaller alone.

    Args:
        rows: numbers of the batch's rows in the corpus.
        longest: tokens of its longest row.
        batch_tokens: the present `probe.batch_tokens`.
        path: where the next start finds how large its batches may be; None: nowhere.
    """
    if len(rows) == 1:
        return GradsDistError(
            f"{OUT_OF_MEMORY}: row {rows[0]} ({longest} tokens) does not fit alone; lower data.max_length, "
            "set model.gradient_checkpointing, use a higher ZeRO stage or offload, or more ranks"
        )
    smaller = max(1, batch_tokens // 2)
    while smaller >= len(rows) * longest:
        # A small corpus may not fill its batches.
        smaller //= 2
    if path is not None:
        write_json(path, {"batch_tokens": smaller})
    return OutOfMemory(
        f"{OUT_OF_MEMORY} in a batch of rows {name_rows(rows)} (longest: {longest} tokens); start the same "
        f"command again: it goes on with probe.batch_tokens {smaller} instead of {batch_tokens}"
    )


def allowed_tokens(batch_tokens: int, path: Path) -> int:
    """`probe.batch_tokens`, or what an earlier start of the run that ran out of memory left of it.

    Raises GradsDistError when the file cannot be read.
    """
    if not path.is_file():
        return batch_tokens
    try:
        smaller = json.loads(path.read_text(encoding="utf-8"))["batch_tokens"]
        allowed = min(batch_tokens, max(1, int(smaller)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GradsDistError(f"{path}: cannot be read ({error}); remove it") from None
    if allowed < batch_tokens:
        log.warning("probe.batch_tokens: %d instead of %d, since memory ran out", allowed, batch_tokens)
    return allowed


def name_rows(rows: np.ndarray, most: int = 8) -> str:
    """The numbers of some rows, in words."""
    shown = ", ".join(map(str, rows[:most].tolist()))
    return f"{shown} and {len(rows) - most} more" if len(rows) > most else shown


def largest_batches(plan: Plan, num_tokens: np.ndarray) -> list[int]:
    """The micro-batches of a plan that need most memory: that with most padded tokens, and the longest."""
    if len(plan.batch_offsets) < 2:
        return []
    # Rows of a micro-batch come in descending length.
    longest = num_tokens[plan.order[plan.batch_offsets[:-1]]].astype(np.int64)
    padded = longest * np.diff(plan.batch_offsets)
    return sorted({int(np.argmax(padded)), int(np.lexsort((padded, longest))[-1])})
