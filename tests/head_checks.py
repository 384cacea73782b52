"""The LM head's pass with the CUDA kernels, against the same pass in float64 and in torch.

The same checks run on the emulator and on a GPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_dist.stats import backend
from grads_dist.stats.head_pass import HeadPass
from grads_dist.stats.head_request import HeadRequest, HeadResult, LogitTransform
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics

CPU = torch.device("cpu")
LENGTHS = (5, 1, 17, 2, 3)


@dataclass(frozen=True)
class Case:
    """A head and what is asked of it. `chunk` is in label positions."""

    dtype: torch.dtype = torch.bfloat16
    vocab: int = 2101
    dim: int = 96
    lengths: tuple[int, ...] = LENGTHS
    chunk: int = 32
    transform: LogitTransform = LogitTransform()
    tied: bool = False
    bias: bool = False
    train: bool = False
    certified: int = 5


CASES = {
    "plain": Case(),
    "plain, float32": Case(torch.float32, bias=True),
    "float16, and a sample without labels": Case(torch.float16, lengths=(5, 1, 17, 0, 3)),
    "soft-capped": Case(transform=LogitTransform(softcap=3.0)),
    "scaled": Case(torch.float32, transform=LogitTransform(scale=0.25)),
    "tied": Case(tied=True, bias=True, train=True),
    "trained": Case(bias=True, train=True),
    "a small vocabulary": Case(vocab=101, dim=24, train=True, certified=0),
    "samples longer than a chunk": Case(vocab=101, dim=24, lengths=(9, 40, 2), chunk=16, certified=0),
    "samples longer than a chunk, tied": Case(
        vocab=61, dim=24, lengths=(9, 20), chunk=16, tied=True, certified=0
    ),
}


@contextmanager
def forced(name: str) -> Iterator[None]:
    """With one backend."""
    before = os.environ.get(backend.VARIABLE)
    os.environ[backend.VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[backend.VARIABLE]
        if before is not None:
            os.environ[backend.VARIABLE] = before


@dataclass(frozen=True)
class Head:
    """Inputs whose logits are exact in bfloat16, in whatever order they are summed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    kept_ids: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, case: Case) -> Head:
        """Elements are multiples of 1/2 (at most 1) and of 1/4 (at most 1/2); logits stay below 16."""
        draw = torch.Generator().manual_seed(case.vocab + len(case.lengths))
        hidden = torch.randint(-2, 3, (sum(case.lengths), case.dim), generator=draw) / 2.0
        weight = torch.randint(-2, 3, (case.vocab, case.dim), generator=draw) / 4.0
        bias = torch.randint(-4, 5, (case.vocab,), generator=draw) / 8.0 if case.bias else None
        assert (hidden @ weight.t()).abs().max() < 15
        targets = torch.randint(0, case.vocab, (len(hidden),), generator=draw)
        targets[::2] = (hidden @ weight.t())[::2].argmax(1)
        kept = None
        if case.tied:
            ids = torch.randint(0, case.vocab, (len(case.lengths), 7), generator=draw)
            kept = tuple(torch.unique(row) for row in ids)
        return cls(hidden, weight, bias, targets, kept)


def prepared(head: Head, case: Case, dtype: torch.dtype, device: torch.device, name: str) -> HeadPass:
    """The pass with one backend, its inputs on the device."""
    weights = torch.linspace(0.5, 1.0, len(case.lengths), dtype=torch.float64, device=device)
    kept = None if head.kept_ids is None else tuple(ids.to(device) for ids in head.kept_ids)
    request = HeadRequest(Segments(case.lengths), weights, case.transform, case.chunk, True, kept)
    bias = None if head.bias is None else head.bias.to(device, dtype)
    inputs = head.hidden.to(device, dtype), head.weight.to(device, dtype), bias, head.targets.to(device)
    with forced(name):
        pass_ = HeadPass(*inputs, request, HeadResult())
    assert pass_.backend == (name if dtype != torch.float64 else "reference")
    pass_.allocate(case.train, case.train, case.train)
    return pass_


def run(head: Head, case: Case, dtype: torch.dtype, device: torch.device, name: str) -> tuple:
    """The pass' result and the gradients."""
    pass_ = prepared(head, case, dtype, device, name)
    with forced(name):
        pass_.run()
    return pass_.result, (pass_.grad_hidden, pass_.grad_weight, pass_.grad_bias)


def numbers(result: HeadResult, case: Case) -> dict[str, tuple[Tensor, float | Tensor]]:
    """What a result holds of the samples with positions, float64 on the CPU, each with its unit of error."""
    has_any = torch.tensor(case.lengths) > 0
    of_samples = {"loss": (result.losses, 1.0), "el2n": (result.el2n, 1.0)}
    for name in ("weight", "rest", "bias"):
        stats: Statistics | None = getattr(result, f"{name}_stats")
        if stats is None:
            continue
        numel = case.vocab * (1 if name == "bias" else case.dim)
        # A sum is over so many elements that may each be wrong.
        of_samples[f"{name} sum"] = (stats.sum, stats.norm().cpu()[has_any] * numel**0.5)
        of_samples[f"{name} norm"] = (stats.norm(), stats.norm().cpu()[has_any])
        for key in ("min", "max"):
            of_samples[f"{name} {key}"] = (getattr(stats, key), getattr(stats, key).abs().cpu()[has_any])
        assert not stats.nonfinite[has_any.to(stats.nonfinite.device)].any()
    found = {key: (x.double().cpu()[has_any], unit) for key, (x, unit) in of_samples.items()}
    if result.kept_rows:
        kept = [rows for rows, n in zip(result.kept_rows, case.lengths, strict=True) if n]
        found["kept rows"] = (torch.cat(kept).double().cpu(), 1.0)
    return found


def check_head(device: str, name: str) -> None:
    """No further from float64 than twice what torch in float32 is, or a few roundings; gradients likewise."""
    case = CASES[name]
    head = Head.of(case)
    found, gradients = run(head, case, case.dtype, torch.device(device), "cuda")
    plain, plain_gradients = run(head, case, case.dtype, CPU, "reference")
    truth, _ = run(head, case, torch.float64, CPU, "reference")
    ours, theirs, exact = (numbers(result, case) for result in (found, plain, truth))
    faults = []
    for key, (value, unit) in exact.items():
        bound = 2 * (theirs[key][0] - value).abs() + 4e-6 * unit
        error = (ours[key][0] - value).abs()
        if not (error <= bound).all():
            faults.append(f"{key}: {error} off, {bound} allowed")
    for key, mine, reference in zip(("hidden", "weight", "bias"), gradients, plain_gradients, strict=True):
        if mine is not None and reference is not None:
            # The weight's is a product in the model's type, as plain training's.
            bound = (2.0**-7 if case.dtype == torch.bfloat16 else 1e-5) * reference.abs().max()
            if not (mine.cpu() - reference).abs().max() <= bound:
                faults.append(f"gradient of {key}: {(mine.cpu() - reference).abs().max()} off")
    assert not faults, "\n".join(faults)
    assert found.num_certified == case.certified
    assert not case.certified or found.rows_formed >= 256 * case.certified


def check_head_waits(device: str) -> None:
    """The host waits for the device once: for whether one look at the bound is enough for all samples."""
    case = CASES["plain"]
    head = Head.of(case)
    for _ in range(2):  # the first compiles and loads, which does wait
        pass_ = prepared(head, case, case.dtype, torch.device(device), "cuda")
        with forced("cuda"), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                pass_.run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    assert len(waits) <= 1, waits


def check_head_nonfinite(device: str) -> None:
    """A NaN stays in its sample, where it is counted, and changes no bit of another's numbers."""
    case = CASES["a small vocabulary"]
    head = Head.of(case)
    (clean, _), place = run(head, case, case.dtype, torch.device(device), "cuda"), sum(case.lengths[:2])
    head.hidden[place, 3] = torch.nan
    found, _ = run(head, case, case.dtype, torch.device(device), "cuda")
    assert found.losses[2].isnan() and found.el2n[2].isnan() and found.weight_stats.nonfinite[2] > 0
    for i in (0, 1, 4):
        assert found.losses[i] == clean.losses[i] and found.el2n[i] == clean.el2n[i]
        for key in ("sum", "sumsq", "min", "max", "nonfinite"):
            assert getattr(found.weight_stats, key)[i] == getattr(clean.weight_stats, key)[i]
