"""Times of the CUDA kernels and of what a user would write in torch, on one device (gpu_check.py).

All variants of a case run in turns, so that what slows the device slows all alike. `ratio` is a variant's
time over that of the case's first (torch's weight gradient, or a copy) in the same turn.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from head_checks import forced
from torch import Tensor

from grads_dist.stats import cuda, cuda_head, cuda_launch, cuda_rows
from grads_dist.stats.cuda_driver import DeviceLauncher
from grads_dist.stats.cuda_launch import Launcher
from grads_dist.stats.cuda_tile import Tile
from grads_dist.stats.head_pass import HeadPass
from grads_dist.stats.head_request import HeadRequest, HeadResult, LogitTransform
from grads_dist.stats.segments import Segments

COLUMNS = "operation p d lengths variant ms ms_p20 ms_p80 tflops gb_per_s ratio repeats note".split()
TABLE = "operation p d lengths variant ms tflops gb_per_s ratio note".split()
SHAPES = ((14336, 4096), (4096, 4096), (1024, 4096))
UNIFORM = {32: (64,), 64: (64,), 128: (64,), 256: (32, 1), 512: (16,), 1024: (8, 1), 2048: (4,), 4096: (2, 1)}
"""Tokens a sample: numbers of samples."""
BATCHES = {f"{s} x {t}": [t] * s for t, counts in UNIFORM.items() for s in counts} | {
    "ragged 32..512": [32 + 60 * (i * 5 % 9) for i in range(32)],
    "experts, 48 each": [48] * 64,
}
WARM_UP, REPEATS, RUNS_AT_ONCE, CASE_SECONDS = 2, 9, 5, 3.0

Run = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    """Something to time; `flops` and `bytes` are what it has to do at the least."""

    run: Run
    flops: float = 0.0
    bytes: float = 0.0


def measure(device: torch.device, deadline: float) -> Iterator[dict[str, object]]:
    """One row a variant; cases that would end after `deadline` (monotonic seconds) are left out and named."""
    for name, batch, shape, make in cases(device):
        labels = {"operation": name, "lengths": batch, "p": shape[0], "d": shape[1]}
        if time.monotonic() + 2 * CASE_SECONDS > deadline:
            yield blank(labels, "", "no time left")
            continue
        try:
            yield from time_case(labels, make())
        except torch.OutOfMemoryError:
            yield blank(labels, "", "out of memory")
        torch.cuda.empty_cache()


def cases(
    device: torch.device,
) -> Iterator[tuple[str, str, tuple[int, int], Callable[[], dict[str, Variant]]]]:
    """The largest matrix last: it is what a short deadline cuts off, and the least telling."""
    yield "rows", "16 x 1024", (0, 4096), lambda: row_variants(device, [1024] * 16, 4096)
    yield "head", "8 x 256", (128256, 0), lambda: head_variants(device, [256] * 8, 128256)
    yield "head pass", "8 x 256", (128256, 4096), lambda: head_pass_variants(device, [256] * 8, 128256, 4096)
    for shape in reversed(SHAPES):
        for batch, lengths in BATCHES.items():
            yield (
                "outer product",
                batch,
                shape,
                lambda s=shape, n=lengths: outer_product_variants(device, s, n),
            )


def time_case(labels: dict[str, object], variants: dict[str, Variant]) -> Iterator[dict[str, object]]:
    """Milliseconds of every variant in turns; the first is what the ratios are taken to."""
    names, notes = list(variants), {}
    for name in names:
        try:
            for _ in range(WARM_UP):
                variants[name].run()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
    running = [name for name in names if name not in notes]
    times: dict[str, list[float]] = {name: [] for name in running}
    end = time.monotonic() + CASE_SECONDS
    while len(times[running[0]]) < REPEATS and (time.monotonic() < end or len(times[running[0]]) < 3):
        for name in random.sample(running, len(running)):
            times[name].append(milliseconds(variants[name].run))
    base = np.array(times[names[0]])
    for name in names:
        if name in notes:
            yield blank(labels, name, notes[name])
            continue
        p20, median, p80 = np.quantile(times[name], [0.2, 0.5, 0.8]).tolist()
        yield labels | {
            "variant": name,
            "ms": median,
            "ms_p20": p20,
            "ms_p80": p80,
            "tflops": variants[name].flops / median / 1e9 or None,
            "gb_per_s": variants[name].bytes / median / 1e6 or None,
            "ratio": float(np.median(np.array(times[name]) / base)),
            "repeats": len(base),
            "note": None,
        }


def milliseconds(run: Run) -> float:
    """Time of one of a few runs in a row on the device's clock: in training, too, the host is ahead of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(RUNS_AT_ONCE):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / RUNS_AT_ONCE


def blank(labels: dict[str, object], variant: str, note: str) -> dict[str, object]:
    """A row without numbers."""
    return dict.fromkeys(COLUMNS) | labels | {"variant": variant, "note": note}


def outer_product_variants(
    device: torch.device, shape: tuple[int, int], lengths: list[int]
) -> dict[str, Variant]:
    """The kernel alone and with the batch gradient, against the weight gradient and three other ways.

    On Hopper the kernels by mma.sync run beside those for sm_90a. The ratio of two variants' times is that of
    their rates, upside down.
    """
    rows = sum(lengths)
    b, a = (torch.randn(rows, n, device=device, dtype=torch.bfloat16) for n in shape)
    total, scratch = (torch.zeros(shape, device=device, dtype=t) for t in (torch.float32, torch.bfloat16))
    weights, pairs = [1.0] * len(lengths), list(zip(b.split(lengths), a.split(lengths), strict=True))
    flops = 2.0 * rows * shape[0] * shape[1]
    each_row = cuda_rows.RowRuns(
        None, torch.arange(shape[0] + 1, device=device), torch.tensor([0, shape[0]], device=device)
    )

    def statistics() -> None:
        cuda.outer_product_stats(b, a, lengths)

    def with_gradient() -> None:
        cuda.outer_product_stats(b, a, lengths, total, weights)

    def one_by_one() -> None:
        for b_s, a_s in pairs:
            torch.mm(b_s.t(), a_s, out=scratch)
            torch.aminmax(scratch)
            torch.linalg.vector_norm(scratch, dtype=torch.float32)

    def one_pass() -> None:
        for b_s, a_s in pairs:
            torch.mm(b_s.t(), a_s, out=scratch)
            cuda_rows.row_run_stats(scratch, each_row)

    def batched() -> None:
        g = torch.bmm(b.view(len(lengths), -1, shape[0]).transpose(1, 2), a.view(len(lengths), -1, shape[1]))
        reduce_gradients(g)

    runs: dict[str, Run] = {
        "weight gradient": lambda: torch.mm(b.t(), a, out=scratch),
        "statistics": statistics,
        "statistics and batch gradient": with_gradient,
        "statistics, tile of 128 x 256": with_launcher(wide_launcher(device), statistics),
        "a product a sample, then reductions": one_by_one,
        "a product a sample, then one reduction": one_pass,
    }
    if cuda_launch.launcher_for(device).hopper is not None:
        runs["statistics, mma.sync"] = with_launcher(mma_launcher(device), statistics)
        runs["statistics and batch gradient, mma.sync"] = with_launcher(mma_launcher(device), with_gradient)
    if len(set(lengths)) == 1:
        runs["bmm, then reductions"] = batched
    return {name: Variant(run, flops=flops) for name, run in runs.items()}


@functools.cache
def mma_launcher(device: torch.device) -> DeviceLauncher:
    """The kernels by mma.sync, whatever the device."""
    return DeviceLauncher(device, cuda_launch.launcher_for(device).tile)


@functools.cache
def wide_launcher(device: torch.device) -> DeviceLauncher:
    """Those with a tile that reads a quarter less from the second-level cache, one block an SM."""
    return DeviceLauncher(device, Tile(cols=256, stages=3, blocks_per_multiprocessor=1))


def with_launcher(launcher: Launcher, run: Run) -> Run:
    """`run` with the kernels of another launcher."""

    def swapped() -> None:
        usual = cuda_launch.launcher_for
        cuda_launch.launcher_for = lambda _: launcher
        try:
            run()
        finally:
            cuda_launch.launcher_for = usual

    return swapped


def reduce_gradients(g_SPD: Tensor) -> None:
    """Largest, smallest and norm of every sample's gradient."""
    flat = g_SPD.flatten(1)
    flat.amax(1)
    flat.amin(1)
    torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)


def row_variants(device: torch.device, lengths: list[int], width: int) -> dict[str, Variant]:
    """Embedding rows and a norm's gain, against a copy of the same rows."""
    rows, vocabulary = sum(lengths), 128256
    b, x = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    ids = (torch.rand(rows, device=device) ** 4 * vocabulary).long()
    rstd, runs = torch.ones(rows, device=device), cuda_rows.find_runs(ids, lengths, vocabulary)
    size, copy = float(b.nbytes), torch.empty_like(b)
    return {
        "copy": Variant(lambda: copy.copy_(b), bytes=2 * size),
        "find runs": Variant(lambda: cuda_rows.find_runs(ids, lengths, vocabulary)),
        "embedding statistics": Variant(lambda: cuda_rows.embedding_stats(b, runs, vocabulary), bytes=size),
        "bias statistics": Variant(lambda: cuda_rows.vector_stats(b, lengths), bytes=size),
        "gain statistics": Variant(lambda: cuda_rows.vector_stats(b, lengths, x, rstd), bytes=2 * size),
    }


def head_variants(device: torch.device, lengths: list[int], vocabulary: int) -> dict[str, Variant]:
    """The softmax gradient and the bounds, against a copy of the logits and torch's own."""
    rows = sum(lengths)
    logits = torch.randn(rows, vocabulary, device=device)
    out, weights = torch.empty_like(logits), torch.rand(rows, device=device)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    size = float(logits.nbytes)
    return {
        "copy": Variant(lambda: out.copy_(logits), bytes=2 * size),
        "torch softmax": Variant(lambda: torch.softmax(logits, 1, out=out), bytes=2 * size),
        "softmax gradient": Variant(lambda: cuda_head.softmax_gradient(logits, targets, out), bytes=2 * size),
        "column bounds": Variant(lambda: cuda_head.column_bounds(out, weights, lengths), bytes=size),
    }


def head_pass_variants(
    device: torch.device, lengths: list[int], vocabulary: int, width: int
) -> dict[str, Variant]:
    """Loss, statistics and input gradient of the head, against the loss and gradient alone in torch."""
    rows = sum(lengths)
    hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16) * 2 / width**0.5
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    shares = torch.ones(len(lengths), dtype=torch.float64, device=device)

    def plain() -> None:
        gradient = torch.softmax((hidden @ weight.t()).float(), 1)
        torch.mm(gradient.to(weight.dtype), weight)

    def with_statistics(backend: str) -> None:
        request = HeadRequest(Segments(tuple(lengths)), shares, LogitTransform(), rows, with_stats=True)
        with forced(backend):
            head = HeadPass(hidden, weight, None, targets, request, HeadResult())
            head.allocate(True, False, False)
            head.run()

    return {
        "torch, no statistics": Variant(plain),
        "statistics in torch": Variant(lambda: with_statistics("reference")),
        "statistics by the kernels": Variant(lambda: with_statistics("cuda")),
    }
