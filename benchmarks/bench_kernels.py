"""What per-sample statistics of a linear layer's weight cost, against torch's own weight gradient.

    python benchmarks/bench_kernels.py            float32 and bfloat16, T = 32..4096, S = 1..64, ragged
    python benchmarks/bench_kernels.py --smoke    a few seconds, to see that it works
    python benchmarks/bench_kernels.py --name cpu_avx512    results/bench_kernels_cpu_avx512.csv

All ways run on the same tensors in turns, in an order drawn anew for each repetition; ratios are to
`weight-gradient`, the product B^T A of the whole batch, in the same repetition. Before anything is timed,
their results are compared. `statistics` is the kernel alone, `shared` the kernel with the weight gradient
from the same tiles; `reference` and `reference-shared` are the same in torch; `bmm` forms all samples'
gradients at once, padded, and `vmap` the same through torch.func; both are left out where they would need
more memory than --max-mib.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from report import format_table, provenance, write_csv
from timing import Spread, time_in_turns
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grads_dist.stats import native, reference

COLUMNS = (
    "way type tokens_per_sample num_samples ragged num_b num_a seconds_median gflops ratio_median ratio_p25 "
    "ratio_p75 ratio_min ratio_max repeats variant device threads cpu_model torch deepspeed transformers "
    "commit date"
).split()
TABLE = "way type tokens_per_sample num_samples gflops ratio_median ratio_p25 ratio_p75".split()
BASE = "weight-gradient"
SHAPES = [(32, 64), (64, 32), (128, 16), (256, 8), (1024, 4), (4096, 1), (256, 1)]
"""Tokens a sample, and samples."""
RAGGED = [17, 300, 64, 5, 700, 128, 33, 801]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative difference allowed between ways; in bfloat16 bmm rounds the gradients before they are reduced."""

Way = Callable[[None], object]


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, write the CSV and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("P", "D"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-mib", type=int, default=1024, help="memory for gradients of bmm and vmap")
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    parser.add_argument("--name", default="cpu", help="of the machine; ends the name of the CSV")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.size, args.repeats = (48, 32), 2
    shapes = [[t] * s for t, s in (SHAPES[:2] if args.smoke else SHAPES)] + [RAGGED]
    rows = [
        row
        for dtype in (torch.float32, torch.bfloat16)
        for lengths in shapes
        for row in measure(dtype, lengths, args)
    ]
    out = Path(args.out or (tempfile.mkdtemp() if args.smoke else Path(__file__).parent / "results"))
    path = out / f"bench_kernels_{'smoke' if args.smoke else args.name}.csv"
    write_csv(path, COLUMNS, rows)
    print(format_table(TABLE, rows))
    print(path)


def measure(dtype: torch.dtype, lengths: list[int], args: argparse.Namespace) -> list[dict[str, object]]:
    """One row of results for each way on one shape."""
    torch.manual_seed(0)
    num_b, num_a = args.size
    b, a = (torch.randn(sum(lengths), n).to(dtype) for n in (num_b, num_a))
    ways = make_ways(b, a, lengths, args.max_mib)
    check(ways, TOLERANCE[dtype])
    for way in ways.values():
        way(None)
    seconds = time_in_turns(ways, [None] * args.repeats, 0, b.device)
    flops = 2.0 * sum(lengths) * num_b * num_a
    constants = {
        "type": str(dtype).removeprefix("torch."),
        "tokens_per_sample": max(lengths),
        "num_samples": len(lengths),
        "ragged": len(set(lengths)) > 1,
        "num_b": num_b,
        "num_a": num_a,
        "repeats": args.repeats,
        "variant": (native.variants() or ("none",))[0],
        **provenance(b.device),
    }
    rows = []
    for name, own in seconds.items():
        spread, middle = Spread.of(own, seconds[BASE]), float(sorted(own)[len(own) // 2])
        rows.append(
            {
                "way": name,
                "seconds_median": middle,
                "gflops": flops / middle / 1e9,
                **{
                    f"ratio_{field}": getattr(spread, field)
                    for field in ("median", "p25", "p75", "min", "max")
                },
                **constants,
            }
        )
    return rows


def make_ways(b: Tensor, a: Tensor, lengths: list[int], max_mib: int) -> dict[str, Way]:
    """All ways to the statistics of one batch; each returns (sumsq, min, max) if it computes them."""
    shape = (b.shape[1], a.shape[1])
    ways: dict[str, Way] = {
        BASE: lambda _: b.t() @ a,
        "reference": lambda _: reference.outer_product_stats(b, a, lengths, None, None)[1:],
        "reference-shared": lambda _: reference.outer_product_stats(b, a, lengths, torch.zeros(shape), None)[
            1:
        ],
    }
    if native.variants():
        ways["statistics"] = lambda _: native.outer_product_stats(b, a, lengths, None, None)[1:]
        ways["shared"] = lambda _: native.outer_product_stats(b, a, lengths, torch.zeros(shape), None)[1:]
    if len(lengths) * shape[0] * shape[1] * b.element_size() <= max_mib << 20:
        ways["bmm"] = lambda _: by_bmm(b, a, lengths)
        if len(set(lengths)) == 1:
            ways["vmap"] = lambda _: by_vmap(b, a, lengths)
    return ways


def by_bmm(b: Tensor, a: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients at once, then their reductions."""
    padded = [pad_sequence(list(x.split(lengths)), batch_first=True) for x in (b, a)]
    gradients = torch.bmm(padded[0].transpose(1, 2), padded[1]).flatten(1)
    return torch.linalg.vector_norm(gradients, dim=1).double().square(), gradients.amin(1), gradients.amax(1)


def by_vmap(b: Tensor, a: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a linear layer through torch.func, one sample at a time in parallel."""
    num = len(lengths)
    weight = torch.zeros(b.shape[1], a.shape[1], dtype=b.dtype)

    def loss(w: Tensor, x: Tensor, g: Tensor) -> Tensor:
        return ((x @ w.t()) * g).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    gradients = per_sample(weight, a.view(num, -1, a.shape[1]), b.view(num, -1, b.shape[1])).flatten(1)
    return torch.linalg.vector_norm(gradients, dim=1).double().square(), gradients.amin(1), gradients.amax(1)


def check(ways: dict[str, Way], tolerance: float) -> None:
    """Raise AssertionError naming a way whose numbers are not the reference's."""
    truth = ways["reference"](None)
    for name, way in ways.items():
        if name == BASE:
            continue
        for ours, theirs in zip(way(None), truth, strict=True):  # type: ignore[call-overload]
            error = ((ours.double() - theirs) / theirs).abs().max().item()
            assert error <= tolerance, f"{name}: relative difference {error:.2g} to the reference"


if __name__ == "__main__":
    main()
