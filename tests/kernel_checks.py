"""What a CUDA kernel's results are held against: float64, and bounds of what float32 may get wrong.

The same checks run on the emulator, on broken copies of the source (which must fail them), and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grads_dist.stats import cuda, cuda_head, cuda_rows, ops, reference
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics

EPS = torch.finfo(torch.float32).eps
EDGES = [0, 1, 15, 16, 17, 63, 64, 65]
FIELDS = ("sum", "sumsq", "min", "max", "nonfinite")


def poisoned(rows: int, cols: int, dtype: torch.dtype, device: str, pad: int = 8, seed: int = 0) -> Tensor:
    """Normal numbers [rows, cols] inside a larger matrix of NaN: what a kernel must not read shows."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + cols)
    frame = torch.full((rows + 2, -(-cols // 8) * 8 + pad), torch.nan)
    frame[1 : rows + 1, :cols] = torch.randn(rows, cols, generator=generator)
    return frame.to(device, dtype)[1 : rows + 1, :cols]


def split(x: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(x.double().cpu().split(lengths))


def assert_near(found: Statistics, gradients: list[Tensor], errors: list[Tensor]) -> None:
    """Each element of a gradient may be wrong by its entry of `errors`, and squares are summed in float32."""
    faults = []
    for i, (g, e) in enumerate(zip(gradients, errors, strict=True)):
        truth = {"sum": g.sum(), "sumsq": g.square().sum(), "min": g.min(), "max": g.max()}
        squares = 2 * g.norm() * e.norm() + e.square().sum() + 64 * EPS * truth["sumsq"]
        bounds = {"sum": e.sum() + 1e-12 * g.abs().sum(), "sumsq": squares, "min": e.max(), "max": e.max()}
        for name, value in truth.items():
            error = abs(getattr(found, name)[i].item() - value.item())
            if not error <= bounds[name] + 1e-300:
                faults.append(f"sample {i} {name}: {error:.3g} off, {bounds[name]:.3g} allowed")
        if found.nonfinite[i] != 0:
            faults.append(f"sample {i}: {found.nonfinite[i]} counted as not finite")
    assert not faults, "\n".join(faults)


def assert_same_bits(found: Statistics, truth: Statistics) -> None:
    """Equal to the last bit; NaN equals NaN, and a zero another."""
    for name in FIELDS:
        x, y = getattr(found, name) + 0, getattr(truth, name) + 0
        assert torch.equal(x.view(torch.int64), y.view(torch.int64)), (name, x, y)


def part(stats: Statistics, i: int) -> Statistics:
    return Statistics(*(getattr(stats, name)[i : i + 1].clone() for name in FIELDS))


def outer(b: Tensor, a: Tensor, lengths: list[int], *total) -> Statistics:
    return cuda.outer_product_stats(b, a, lengths, *total)


def outer_truth(b: Tensor, a: Tensor, lengths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients, and what T products added in float32, by truncation at worst, may get wrong."""
    pairs = list(zip(split(b, lengths), split(a, lengths), strict=True))
    errors = [2 * (len(b_s) + 1) * EPS * (b_s.abs().T @ a_s.abs()) for b_s, a_s in pairs]
    return [b_s.T @ a_s for b_s, a_s in pairs], errors


def check_outer(device: str, shape=(70, 101), dtype=torch.bfloat16, lengths=EDGES) -> None:
    """Statistics against float64."""
    b, a = (poisoned(sum(lengths), n, dtype, device, seed=i) for i, n in enumerate(shape))
    found, (gradients, errors) = outer(b, a, lengths), outer_truth(b, a, lengths)
    assert_near(found, gradients, errors)


def check_outer_against_reference(device: str) -> None:
    """No further from float64 than twice what torch in float32 is, or a few roundings."""
    lengths, shape = EDGES[1:], (70, 101)
    b, a = (poisoned(sum(lengths), n, torch.bfloat16, device, seed=i) for i, n in enumerate(shape))
    reference = ops.outer_product_stats(b.cpu(), a.cpu(), Segments(tuple(lengths)))
    found, (gradients, _) = outer(b, a, lengths), outer_truth(b, a, lengths)
    truth = {
        "min": torch.stack([g.min() for g in gradients]),
        "max": torch.stack([g.max() for g in gradients]),
        "norm": torch.stack([g.norm() for g in gradients]),
    }
    for name, exact in truth.items():
        ours, theirs = (x.norm() if name == "norm" else getattr(x, name) for x in (found, reference))
        ours, theirs = (((x.cpu() - exact) / exact).abs() for x in (ours, theirs))
        assert ours.max() <= 2 * theirs.max() + 4 * EPS, (name, ours, theirs)


def check_outer_masks(device: str) -> None:
    """Columns beyond the matrix are zeros, which only show where no element is near zero."""
    lengths, dtype = [16, 3], torch.bfloat16
    for shape in ((64, 9), (7, 64), (7, 9)):
        b, a = (torch.rand(sum(lengths), n, device=device).to(dtype) + 1 for n in shape)
        found, (gradients, _) = outer(b, a, lengths), outer_truth(b, a, lengths)
        lowest = torch.stack([g.min() for g in gradients])
        torch.testing.assert_close(found.min.cpu(), lowest, rtol=1e-5, atol=0)


def check_total(device: str, shape=(70, 101), dtype=torch.bfloat16, lengths=EDGES) -> None:
    """The weighted batch gradient is added to what is there, and changes no statistic but by order."""
    b, a = (poisoned(sum(lengths), n, dtype, device, seed=i) for i, n in enumerate(shape))
    weights = [0.5 - i for i in range(len(lengths))]
    frame = torch.ones(shape[0], shape[1] + 3, device=device)
    found, alone = outer(b, a, lengths, frame[:, : shape[1]], weights), outer(b, a, lengths)
    # Squares are summed in the order of the tile, which may be another one than without a batch gradient.
    torch.testing.assert_close(found.sumsq, alone.sumsq, rtol=1e-6, atol=0)
    assert_same_bits(found, replace(alone, sumsq=found.sumsq))
    gradients, errors = outer_truth(b, a, lengths)
    truth = 1 + sum(w * g for w, g in zip(weights, gradients, strict=True))
    bound = sum(abs(w) * (e + 4 * EPS * g.abs()) for w, g, e in zip(weights, gradients, errors, strict=True))
    error = (frame[:, : shape[1]].double().cpu() - truth).abs()
    assert (error <= 2 * bound + 4 * EPS).all(), error.max()
    assert (frame[:, shape[1] :] == 1).all()


def check_outer_nonfinite(device: str) -> None:
    """What is not finite stays in its sample, is counted, and shows in the extremes."""
    lengths, shape = [17, 16, 33, 5], (70, 101)
    b, a = (poisoned(sum(lengths), n, torch.bfloat16, device, seed=i) for i, n in enumerate(shape))
    clean = outer(b, a, lengths)
    b[17, 3], a[17, 100], a[32, 100] = torch.inf, torch.nan, torch.nan  # first and last token of sample 1
    found = outer(b, a, lengths)
    for i in (0, 2, 3):
        assert_same_bits(part(found, i), part(clean, i))
    assert found.nonfinite.tolist() == [0, 70 + 101 - 1, 0, 0]
    assert all(not getattr(found, name)[1].isfinite() for name in ("sumsq", "min", "max"))
    b[17, 3] = b[18, 3]
    assert outer(b, a, lengths).max[1].isnan()


def check_outer_scales(device: str) -> None:
    """Squares that float32 does not hold are summed; a power of two scales exactly where it does."""
    lengths, shape = [3, 17, 1], (70, 101)
    b, a = (poisoned(sum(lengths), n, torch.bfloat16, device, seed=i) for i, n in enumerate(shape))
    base = outer(b, a, lengths)
    for factor in (2.0**20, -(2.0**-9)):
        scaled = base.scaled(torch.full((3,), factor, device=device))
        assert_same_bits(outer(b * factor, a, lengths), scaled)
    for factor in (2.0**90, 2.0**-90):
        found = outer(b * factor, a, lengths)
        torch.testing.assert_close(found.sumsq, base.sumsq * factor**2, rtol=1e-6, atol=0)
        assert found.nonfinite.tolist() == [0, 0, 0]


def check_outer_neighbours(device: str) -> None:
    """A sample's bits do not depend on the samples beside it, its place, or how many there are."""
    lengths, shape = [3, 17, 1, 64, 5, 0, 33], (70, 101)
    b, a = (poisoned(sum(lengths), n, torch.bfloat16, device, seed=i) for i, n in enumerate(shape))
    together = outer(b, a, lengths)
    order = [3, 6, 1, 4, 0, 5, 2]
    moved = [torch.cat([x.split(lengths)[i] for i in order]) for x in (b, a)]
    permuted = outer(*moved, [lengths[i] for i in order])
    for place, i in enumerate(order):
        alone = outer(b.split(lengths)[i], a.split(lengths)[i], [lengths[i]])
        assert_same_bits(alone, part(together, i))
        assert_same_bits(alone, part(permuted, place))


def summed_truth(rows: Tensor, lengths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of each sample's rows, and what adding them in float32 may get wrong."""
    parts = rows.double().cpu().split(lengths)
    return [x.sum(0) for x in parts], [(len(x) + 4) * EPS * x.abs().sum(0) for x in parts]


def check_vectors(device: str, width=133, dtype=torch.bfloat16, lengths=EDGES) -> None:
    """Sums of rows, plain and times a normalised input."""
    b, x = (poisoned(sum(lengths), width, dtype, device, seed=i) for i in range(2))
    assert_near(cuda_rows.vector_stats(b, lengths), *summed_truth(b, lengths))
    rstd, mean = torch.rand(2, sum(lengths), device=device) + 0.5
    normalised = ((x.float() - mean[:, None]) * rstd[:, None]).to(dtype).double()
    found = cuda_rows.vector_stats(b, lengths, x, rstd, mean)
    assert_near(found, *summed_truth(b.double() * normalised, lengths))


def check_row_sums(device: str, width=133, dtype=torch.bfloat16) -> None:
    """Sums of rows as the reference has them: in any order, over several runs a sample, under norms."""
    run_lengths, sample_runs = [3, 0, 17, 1, 5], [2, 0, 3]
    rows = sum(run_lengths)
    b, x = (poisoned(rows, width, dtype, device, seed=i) for i in range(2))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
    cases = [(None, None, 0), (None, order, 0), (x, order, 1), (x, None, 2)]
    for x_or_none, order_or_none, norm in cases:
        for lengths, runs in ((run_lengths, sample_runs), ([26], [1]), ([9, 0, 17], [1, 1, 1])):
            offsets = cuda_rows.offsets_tensor(lengths, b.device)
            sums = torch.full((len(lengths), width), torch.nan, device=device)
            arguments = (x_or_none, order_or_none, offsets, runs, norm, 1e-5)
            found = cuda_rows.row_sum_stats(b, *arguments)
            with_rows = cuda_rows.row_sum_stats(b, *arguments, sums)
            exact = [None if y is None else y.cpu() for y in (b, *arguments[:3])]
            exact_sums = torch.empty(len(lengths), width)
            truth = reference.row_sum_stats(*exact, *arguments[3:], exact_sums)
            torch.testing.assert_close(sums.cpu(), exact_sums, rtol=1e-3, atol=2e-3)
            for stats in (found, with_rows):
                for name, expected in zip(FIELDS, truth, strict=False):
                    value = getattr(stats, name).cpu()
                    torch.testing.assert_close(
                        value, expected, rtol=2e-3, atol=5e-2 if name == "sum" else 4e-3
                    )


def check_vector_nonfinite(device: str) -> None:
    """A NaN stays in its sample and is counted once."""
    lengths = [9, 12, 3]
    b = poisoned(24, 133, torch.float32, device)
    clean = cuda_rows.vector_stats(b, lengths)
    b[20, 7] = torch.nan
    found = cuda_rows.vector_stats(b, lengths)
    for i in (0, 2):
        assert_same_bits(part(found, i), part(clean, i))
    assert found.nonfinite.tolist() == [0, 1, 0] and found.max[1].isnan() and found.min[1].isnan()


def check_embedding(device: str, width=33, dtype=torch.bfloat16, padding_idx: int | None = 3) -> None:
    """Summed rows of repeated ids, their statistics, and the zeros of absent ones."""
    lengths, vocabulary = EDGES, 11
    b = poisoned(sum(lengths), width, dtype, device)
    ids = torch.randint(0, vocabulary - 1, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    runs = cuda_rows.find_runs(ids.to(device), lengths, vocabulary, padding_idx)
    out = torch.full((int(runs.run_offsets[-1]) + 1, width), torch.nan, device=device)
    alone = cuda_rows.row_run_stats(b, runs, out)
    found = cuda_rows.embedding_stats(b, runs, vocabulary)
    gradients, errors, rows = [], [], []
    for b_s, ids_s in zip(split(b, lengths), ids.split(lengths), strict=True):
        kept = ids_s != (-1 if padding_idx is None else padding_idx)
        zeros = torch.zeros(vocabulary, width, dtype=torch.float64)
        gradients.append(zeros.index_add(0, ids_s[kept], b_s[kept]))
        errors.append((len(ids_s) + 1) * EPS * zeros.index_add(0, ids_s[kept], b_s[kept].abs()))
        rows.append(gradients[-1][ids_s[kept].unique()])
    assert_near(found, gradients, errors)
    torch.testing.assert_close(out[:-1].double().cpu(), torch.cat(rows), rtol=1e-5, atol=1e-5)
    assert out[-1].isnan().all(), "a row past the last run was written"
    assert alone.min[0] == torch.inf and alone.max[0] == -torch.inf and alone.sumsq[0] == 0


def check_softmax(device: str, width=133, dtype=torch.float32, out_dtype=torch.float32) -> None:
    """Softmax minus one-hot in place, its row sums and the loss; extreme logits and a NaN row included."""
    rows = 6
    logits = poisoned(rows, width, dtype, device) * 5
    logits[1] += 1000
    logits[2, : width // 2] = -torch.inf
    logits[3, 5] = torch.nan
    logits[4, width - 1] = 60
    targets = torch.tensor([0, 3, width - 1, 2, width - 1, 7], device=device)
    exact = logits.double().cpu().clone()
    out = logits if out_dtype == dtype else torch.empty(rows, width, dtype=out_dtype, device=device)
    found = cuda_head.softmax_gradient(logits, targets, None if out is logits else out)
    truth = exact.softmax(1)
    truth[torch.arange(rows), targets.cpu()] -= 1
    tolerance = 2e-6 if out_dtype == torch.float32 else 2.0**-8
    error = (found.gradient.double().cpu() - truth).abs()
    ok = torch.tensor([0, 1, 2, 4, 5])
    assert (error[ok] <= tolerance * truth.abs()[ok] + 3e-7).all(), error[ok].max()
    assert found.gradient[3].isnan().all() and found.loss[3].isnan() and found.sumsq[3].isnan()
    loss = -exact.log_softmax(1)[torch.arange(rows), targets.cpu()]
    for x, y in (
        (found.loss, loss),
        (found.logsumexp, exact.logsumexp(1)),
        (found.sum, truth.sum(1)),
        (found.sumsq, truth.square().sum(1)),
    ):
        torch.testing.assert_close(x.double().cpu()[ok], y[ok], rtol=4e-6, atol=4e-6)


def check_column_bounds(device: str, width=533, dtype=torch.float32) -> None:
    """Never below the exact sums, and hardly above them; tiny gradients included."""
    lengths = [5, 0, 40, 1]
    d = poisoned(sum(lengths), width, dtype, device)
    d[:, 7] *= 2.0**-100
    weights = torch.rand(sum(lengths), device=device)
    norms, weighted = cuda_head.column_bounds(d, weights, lengths)
    parts = zip(split(d, lengths), weights.double().cpu().split(lengths), strict=True)
    for s, (d_s, w_s) in enumerate(parts):
        truths = d_s.square().sum(0).sqrt(), (d_s.abs() * w_s[:, None]).sum(0)
        for bound, truth in zip((norms[s], weighted[s]), truths, strict=True):
            bound = bound.double().cpu()
            assert (bound >= truth).all() and (bound <= truth * (1 + 2e-5) + 2e-18).all()


def all_kernels(device: str, shape=(200, 130), lengths=(33, 0, 65, 1)) -> Callable[[], list[Tensor]]:
    """Something that runs every kernel on the same inputs and gives all their results."""
    lengths, rows = list(lengths), sum(lengths)
    b, a = (poisoned(rows, n, torch.bfloat16, device, seed=i) for i, n in enumerate(shape))
    ids = torch.arange(rows, device=device) % 7
    logits = poisoned(rows, shape[1], torch.float32, device)
    weights = torch.rand(rows, device=device)

    def run() -> list[Tensor]:
        total = torch.zeros(shape, device=device)
        stats = [
            outer(b, a, lengths, total, [0.5] * len(lengths)),
            cuda_rows.vector_stats(b, lengths),
            cuda_rows.embedding_stats(b, cuda_rows.find_runs(ids, lengths, 9), 9),
        ]
        softmax = cuda_head.softmax_gradient(logits, ids, torch.empty_like(logits))
        bounds = cuda_head.column_bounds(softmax.gradient, weights, lengths)
        numbers = [getattr(s, name) for s in stats for name in FIELDS]
        return [total, *numbers, *vars(softmax).values(), *bounds]

    return run


def check_repeats(device: str, *sizes) -> None:
    """Every kernel gives the same bits again, whatever its output and workspace held before."""
    run = all_kernels(device, *sizes)
    first = [x.clone() for x in run()]
    for _ in range(3):
        for x, y in zip(run(), first, strict=True):
            assert torch.equal(x, y)
