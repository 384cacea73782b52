"""Variants side by side on the same micro-batches: compared, then timed in turns; one line each."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from report import format_table, provenance, write_csv
from timing import PeakMemory, Spread, time_in_turns
from variants import BASE, Setup, Step, Variant
from workload import SMOKE, Size, Work, micro_batches, save_random_model, synthetic_rows, tokenized_rows

from grads_dist.model.load import load_model
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks
from grads_dist.stats.statistics import Statistics

log = logging.getLogger("trial")

COLUMNS = (
    "variant computes samples_per_s tokens_per_s ratio_median ratio_p25 ratio_p75 ratio_min ratio_max "
    "peak_mib note device threads cpu_model torch deepspeed transformers commit date model model_params "
    "dtype corpus global_batch batch_tokens num_batches num_samples num_tokens"
).split()
TABLE = "variant samples_per_s tokens_per_s ratio_median ratio_p25 ratio_p75 peak_mib note".split()
FIELDS = ("sum", "sumsq", "min", "max")
NUM_WARMUP = 2
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
"""Relative difference allowed between two passes. In float32: sums over a few hundred positions in another
order, through all layers, with room for cancellation. In bfloat16 every layer rounds to eight bits. A wrong
formula is off by much more."""
RIVAL_ERRORS = (RuntimeError, MemoryError, ImportError, ValueError, TypeError, AttributeError, OSError)
"""What a rival that does not work for this model, size or version of torch ends with."""


@dataclass(frozen=True)
class Trial:
    """What one script compares.

    Args:
        name: of the CSV.
        script: file that is started again, in a process of its own, for a variant's memory.
        variants: what is compared; the first is what all ratios are to.
        reference: the variant whose statistics the others must reproduce; it runs whether it is timed or not.
        facts: more columns, and what stands in them.
        imports: modules that do not count as a variant's memory, beside deepspeed; those that there are.
    """

    name: str
    script: str
    variants: tuple[Variant, ...]
    reference: str
    facts: Mapping[str, object]
    imports: tuple[str, ...] = ()

    def named(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)


def make_parser(trial: Trial, description: str | None) -> argparse.ArgumentParser:
    """The options that all trials have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [variant.name for variant in trial.variants]
    parser.add_argument("--model", help="model folder; default: a random Llama of 5M parameters")
    parser.add_argument("--data", help="jsonl or parquet corpus; default: synthetic rows. Needs --model")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=names, help="default: all")
    parser.add_argument("--steps", type=int, help="optimizer steps that are timed (8)")
    parser.add_argument("--global-batch", type=int, help="samples in a step (64)")
    parser.add_argument("--batch-tokens", type=int, help="padded tokens in a micro-batch (4096)")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--memory", action="store_true", help="peak memory too, in a fresh process a variant")
    parser.add_argument(
        "--out", help="folder of the CSV; default: benchmarks/results, a temporary one in smoke"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32", help="of the weights")
    parser.add_argument("--memory-of", choices=names, help=argparse.SUPPRESS)
    return parser


def parse(trial: Trial, parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --smoke changes the sizes' defaults."""
    args = parser.parse_args(argv)
    sizes = (2, 8, 128) if args.smoke else (8, 64, 4096)
    for name, value in zip(("steps", "global_batch", "batch_tokens"), sizes, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    names = [variant.name for variant in trial.variants]
    if unknown := set(args.variants) - set(names):
        parser.error(f"--variants: {sorted(unknown)[0]!r} is not known; allowed: {', '.join(names)}")
    if BASE not in args.variants:
        parser.error(f"--variants: {BASE!r} is what all are compared with; name it too")
    if args.data and not args.model:
        parser.error("--data: needs --model, for its tokenizer")
    return args


def run(trial: Trial, args: argparse.Namespace) -> None:
    """Check, time, measure memory if asked to, write the CSV and print the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    ranks = Ranks.start(detect())
    with tempfile.TemporaryDirectory() as temporary:
        size = SMOKE if args.smoke else Size()
        folder = args.model or str(save_random_model(Path(temporary), size, args.seed))
        num_rows = args.steps * args.global_batch
        setup = Setup(
            folder, args.global_batch, args.batch_tokens, ranks, dtype=args.dtype, num_rows=num_rows
        )
        if args.memory_of:
            print(json.dumps(_peak_memory(trial, args.memory_of, setup, args)))
        else:
            rows = _results(trial, args, setup)
            name = f"{trial.name}_{'smoke' if args.smoke else ranks.device.type}"
            out = Path(args.out or (tempfile.mkdtemp() if args.smoke else Path(__file__).parent / "results"))
            write_csv(out / f"{name}.csv", [*COLUMNS, *trial.facts], rows)
            print(format_table(TABLE, rows))
            print(out / f"{name}.csv")
    ranks.close()


def _make_work(args: argparse.Namespace, setup: Setup) -> list[Work]:
    """The micro-batches that are timed."""
    if args.data:
        rows, lengths = tokenized_rows(args.data, setup.model_folder, setup.num_rows)
    else:
        size = SMOKE if args.smoke else Size()
        rows, lengths = synthetic_rows(setup.num_rows, size, setup.model_folder, args.seed)
    return micro_batches(rows, lengths, args.global_batch, args.batch_tokens, args.seed, setup.ranks.device)


def _results(trial: Trial, args: argparse.Namespace, setup: Setup) -> list[dict[str, object]]:
    """One row of results a variant; a rival that does not run has the reason in `note`."""
    work = _make_work(args, setup)
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    found: dict[str, dict[str, Statistics] | None] = {}
    for variant in trial.variants:
        if variant.name not in {*args.variants, trial.reference}:
            continue
        start = time.perf_counter()
        try:
            step = variant.build(setup)
            found[variant.name] = _warm_up(step, work)
            log.info("%s: built and warm after %.1f s", variant.name, time.perf_counter() - start)
        except RIVAL_ERRORS as error:
            if not variant.may_fail:
                raise
            notes[variant.name] = f"unrun: {_reason(error)}"
            continue
        if variant.name in args.variants:
            steps[variant.name] = step
    known = {name: stats for name, stats in found.items() if stats is not None}
    fields = {variant.name: variant.fields for variant in trial.variants}
    check_equal(known, trial.reference, TOLERANCES[args.dtype], fields)
    memory = {name: _measure_memory(trial, name, args, setup) for name in steps} if args.memory else {}
    seconds = time_in_turns(steps, work, args.seed, setup.ranks.device)
    constants = {**provenance(setup.ranks.device), **_describe(args, setup, work), **trial.facts}
    return [
        _speed(variant, seconds, work)
        | {"peak_mib": memory.get(variant.name), "note": notes.get(variant.name), **constants}
        for variant in trial.variants
        if variant.name in args.variants
    ]


def _reason(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _warm_up(step: Step, work: Sequence[Work]) -> dict[str, Statistics] | None:
    """Run the first micro-batches, ending with a whole optimizer step; returns the first one's statistics."""
    first = step(Work(work[0].batch, ends_step=False))
    for k in range(1, NUM_WARMUP):
        step(Work(work[k % len(work)].batch, ends_step=k == NUM_WARMUP - 1))
    return first


def check_equal(
    found: Mapping[str, Mapping[str, Statistics]],
    reference: str,
    tolerance: float,
    fields: Mapping[str, Sequence[str]],
) -> None:
    """Raise AssertionError naming the first number in which two variants differ, so that it is not timed.

    fields: what a variant has of each gradient; not named, all.
    """
    for name, by_target in found.items():
        for target, stats in by_target.items():
            truth = found[reference][target]
            largest = torch.maximum(truth.max.abs(), truth.min.abs())
            # A sum may be 0 by theory (the LM head's): its error is that of the terms, bounded by the norm.
            scales = {"sum": truth.norm(), "sumsq": truth.sumsq, "min": largest, "max": largest}
            for field in fields.get(name, FIELDS):
                scale = scales[field]
                error = (getattr(stats, field) - getattr(truth, field)).abs()
                assert bool((error <= tolerance * scale).all()), (
                    f"{name}: {field} of {target} is not that of {reference}: "
                    f"relative difference {(error / scale).max().item():.3g}"
                )
            assert not stats.nonfinite.any(), f"{name}: {target} has non-finite gradients"


def _speed(variant: Variant, seconds: Mapping[str, np.ndarray], work: Sequence[Work]) -> dict[str, object]:
    """Speed of one variant over all micro-batches and its ratios to the base; None where it did not run."""
    row: dict[str, object] = {"variant": variant.name, "computes": variant.computes}
    own = seconds.get(variant.name)
    total = None if own is None else float(own.sum())
    row["samples_per_s"] = total and sum(w.num_samples for w in work) / total
    row["tokens_per_s"] = total and sum(w.num_tokens for w in work) / total
    spread = None if own is None else Spread.of(own, seconds[BASE])
    for field in ("median", "p25", "p75", "min", "max"):
        row[f"ratio_{field}"] = spread and getattr(spread, field)
    return row


def _describe(args: argparse.Namespace, setup: Setup, work: Sequence[Work]) -> dict[str, object]:
    """What was run on."""
    model = load_model(setup.model_config, setup.torch_dtype, torch.device("cpu"))
    return {
        "model": Path(args.model).name if args.model else "random Llama",
        "model_params": sum(p.numel() for p in model.parameters()),
        "dtype": args.dtype,
        "corpus": Path(args.data).name if args.data else "synthetic",
        "global_batch": args.global_batch,
        "batch_tokens": args.batch_tokens,
        "num_batches": len(work),
        "num_samples": sum(w.num_samples for w in work),
        "num_tokens": sum(w.num_tokens for w in work),
    }


def _measure_memory(trial: Trial, name: str, args: argparse.Namespace, setup: Setup) -> float:
    """Peak memory of one variant in MiB, in a process of its own."""
    command = [sys.executable, trial.script, "--memory-of", name, "--model", setup.model_folder]
    command += ["--steps", str(args.steps), "--global-batch", str(args.global_batch)]
    command += ["--batch-tokens", str(args.batch_tokens), "--threads", str(torch.get_num_threads())]
    command += ["--seed", str(args.seed), "--dtype", args.dtype] + ["--smoke"] * args.smoke
    command += ["--data", args.data] if args.data else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def _peak_memory(trial: Trial, name: str, setup: Setup, args: argparse.Namespace) -> dict[str, float]:
    """Build the variant and run a few micro-batches; everything after the imports counts."""
    # Before the baseline is taken, whether the variant uses them or not.
    for module in ("deepspeed", *trial.imports):
        with suppress(ImportError):
            import_module(module)
    peak = PeakMemory(setup.ranks.device)
    work = _make_work(args, setup)
    step = trial.named(name).build(setup)
    _warm_up(step, work)
    return {"peak_mib": peak.mib()}
