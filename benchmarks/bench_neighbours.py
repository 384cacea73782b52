"""What the nearest packages cost for per-sample gradients, beside grads_dist on the same batches.

    python benchmarks/bench_neighbours.py --setup DIR     an environment with opacus and bergson
    DIR/bin/python benchmarks/bench_neighbours.py --memory --threads 2
    DIR/bin/python benchmarks/bench_neighbours.py --device cuda --dtype bfloat16 --model DIR --data x.jsonl
    python benchmarks/bench_neighbours.py --smoke         seconds; what is not installed says so in its line

All run on every micro-batch, in an order drawn anew for each, in one process; ratios are to `plain`, a
forward and backward pass without update, on the same micro-batch. None of them trains. What a line computes
is said in it: a norm is less than statistics, a projection less than a gradient. Where two compute the same
numbers, those of the first micro-batch are compared before anything is timed (1e-4 relative in float32, 0.1
in bfloat16).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rivals import (
    PROJECTION_DIM,
    bergson_statistics,
    bergson_store,
    opacus_gradients,
    opacus_norms,
    plain_passes,
    versions,
)
from trial import FIELDS, Trial, make_parser, parse, run
from variants import BASE, LINEAR, PAPER, Variant, frozen_step, per_sample_loop, per_sample_vmap

REFERENCE = "loop-linear"
BODY = ["linear"]
IMPORTED = (
    "opacus.grad_sample",
    "bergson.collector.gradient_collectors",
    "bergson.utils.worker_utils",
)
RIVALS = ("opacus==1.6.0", "bergson==2.5.1")
NEEDS = ("opt-einsum", "simple-parsing", "jaxtyping", "ml_dtypes", "natsort", "petname", "torchopt")
"""What the rivals import and a development environment lacks; their own lists would fetch torchvision."""

_PAPER = "embedding and lm_head"
_BODY = "every linear layer of the body"
_ALL = f"{_PAPER} and {_BODY}"
_FOUR = "sum, norm, min, max of each sample's gradient, exact"
_NORM = "norm of each sample's gradient, exact"
_LOOP, _VMAP = "autograd sample by sample", "torch.func vmap(grad)"
_OPACUS, _GHOST = "opacus GradSampleModule, then reductions", "opacus ghost norms"

VARIANTS = (
    Variant(BASE, "forward and backward pass, gradients of all weights, no sample's own", plain_passes),
    Variant("frozen", f"{_FOUR}: {_PAPER}; grads_dist", partial(frozen_step, targets=PAPER)),
    Variant("frozen-body", f"{_FOUR}: {_BODY}; grads_dist", partial(frozen_step, targets=BODY)),
    Variant("frozen-linear", f"{_FOUR}: {_ALL}; grads_dist", partial(frozen_step, targets=LINEAR)),
    Variant("loop", f"{_FOUR}: {_PAPER}; {_LOOP}", partial(per_sample_loop, targets=PAPER)),
    Variant(REFERENCE, f"{_FOUR}: {_ALL}; {_LOOP}", partial(per_sample_loop, targets=LINEAR)),
    Variant("vmap", f"{_FOUR}: {_PAPER}; {_VMAP}", partial(per_sample_vmap, targets=PAPER), True),
    Variant("vmap-linear", f"{_FOUR}: {_ALL}; {_VMAP}", partial(per_sample_vmap, targets=LINEAR), True),
    Variant("opacus", f"{_FOUR}: {_PAPER}; {_OPACUS}", partial(opacus_gradients, targets=PAPER), True),
    Variant("opacus-linear", f"{_FOUR}: {_ALL}; {_OPACUS}", partial(opacus_gradients, targets=LINEAR), True),
    Variant(
        "opacus-ghost", f"{_NORM}: {_PAPER}; {_GHOST}", partial(opacus_norms, targets=PAPER), True, ("sumsq",)
    ),
    Variant(
        "opacus-ghost-linear",
        f"{_NORM}: {_ALL}; {_GHOST}",
        partial(opacus_norms, targets=LINEAR),
        True,
        ("sumsq",),
    ),
    Variant(
        "bergson-statistics",
        f"{_FOUR}: {_BODY}; bergson's gradients, reduced in its hooks",
        bergson_statistics,
        True,
        FIELDS,
    ),
    Variant(
        "bergson-store",
        f"gradients projected to {PROJECTION_DIM} x {PROJECTION_DIM}, on disk: {_BODY}; bergson's index",
        bergson_store,
        True,
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the rivals' environment, or run the trial."""
    facts = versions("opacus", "bergson")
    trial = Trial("bench_neighbours", __file__, VARIANTS, REFERENCE, facts, IMPORTED)
    parser = make_parser(trial, __doc__)
    parser.add_argument("--setup", metavar="DIR", help="make an environment with the rivals, and end")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    args = parse(trial, parser, argv)
    if args.setup:
        set_up(Path(args.setup))
        return
    choose_device(args.device, parser)
    run(trial, args)


def choose_device(wanted: str | None, parser: argparse.ArgumentParser) -> None:
    """Hide the GPUs, also from the rivals and from processes that are started, where the CPU is wanted."""
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif wanted == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch finds no CUDA device")


def set_up(folder: Path) -> None:
    """A virtual environment that sees the packages of this one, and has the rivals besides."""
    venv.create(folder, with_pip=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)}, scheme="posix_prefix")
    # The package too: in folders that are named here no .pth file is read, such as an editable install's.
    seen = (Path(__file__).resolve().parent.parent, sysconfig.get_paths()["purelib"])
    Path(paths["purelib"], "parent.pth").write_text("".join(f"{p}\n" for p in seen), encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    # bergson's own list would fetch torchvision and torchaudio, and with them perhaps another torch.
    subprocess.run([*pip, "--no-deps", *RIVALS], check=True)
    same_torch = f"torch=={torch.__version__.partition('+')[0]}"
    subprocess.run([*pip, same_torch, *NEEDS], check=True)
    print(f"now: {folder / 'bin' / 'python'} benchmarks/bench_neighbours.py")


if __name__ == "__main__":
    main()
