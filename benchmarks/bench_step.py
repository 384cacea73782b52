"""What a probed training step costs on a GPU at 1B and 8B parameters, for rows of 128 to 4096 tokens.

    python benchmarks/bench_step.py --shape 1b             tens of seconds a row length; one GPU of 80 GB
    python benchmarks/bench_step.py --shape 8b             one GPU of 140 GB
    python benchmarks/bench_step.py --shape 1b --lengths 512 --profile
    python benchmarks/bench_step.py --smoke                toy sizes, also on a CPU, to see that it works

A micro-batch has a fixed number of tokens in rows of one length; every token but a row's first carries loss,
and in training every micro-batch ends with an update. All variants run on every micro-batch, in an order
drawn anew for each; ratios are to `plain` on the same one. Weights are random bfloat16, the learning rate 0.

MFU is the rate of the model's own operations over the device's: for N elements of matrices, L layers of width
W and rows of T tokens, 6 N + 12 L W T a token in training, 4 N + 12 L W T at frozen weights, 2 N + 4 L W T
for a forward pass. Statistics count for nothing. The device's rate is 990 x 10^12 dense bfloat16 operations a
second on H100 and H200 by the datasheet of their SXM versions; --peak-tflops says another.

What does not fit has a line with the reason. Results go to results/bench_step_<shape>_<device>.csv.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from report import format_table, provenance, write_csv
from step_profile import write_profile
from step_shapes import SHAPES, Shape
from step_stage import BASE, VARIANTS, Stage, StepVariant, allocated
from timing import Spread, time_in_turns
from variants import Setup
from workload import SyntheticRows, Work

from grads_dist.probe.batches import collate
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks

COLUMNS = (
    "shape tokens_a_row variant computes tokens_per_s mfu ms_median ratio_median ratio_p25 ratio_p75 "
    "step_mib state_mib peak_mib note rows batch_tokens repeats model_params checkpointing adam bf16 "
    "peak_tflops device threads cpu_model torch deepspeed transformers commit date"
).split()
TABLE = (
    "shape tokens_a_row variant tokens_per_s mfu ms_median ratio_median ratio_p25 ratio_p75 peak_mib note"
).split()
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
SMOKE_LENGTHS = (16, 64)
PROFILED = ("probed", "probed-linear")
PEAK_TFLOPS = {"H100": 990.0, "H200": 990.0}
MIB = 2**20


class Bench:
    """One shape on one device."""

    def __init__(self, shape: str, args: argparse.Namespace, ranks: Ranks, folder: Path) -> None:
        self.name, self.shape, self.args = shape, SHAPES[shape], args
        self.device = ranks.device
        self.batch_tokens = args.batch_tokens or self.shape.batch_tokens
        model, deepspeed = self.shape.save(folder, ranks.device)
        setup = Setup(
            model,
            global_batch=1,
            batch_tokens=self.batch_tokens,
            ranks=ranks,
            dtype="bfloat16",
            deepspeed=deepspeed,
            checkpointing=self.shape.checkpointing,
        )
        self.stages = {mode: Stage(setup, mode) for mode in ("train", "frozen")}
        self.peak_tflops = args.peak_tflops or known_tflops(ranks.device)
        self.constants = describe(self.shape) | provenance(ranks.device)
        self.too_large: dict[str, str] = {}
        """Variants that a shorter row left no memory for, and what is said of them."""

    def measure(self, length: int) -> Iterator[dict[str, object]]:
        """A line for every variant at one row length."""
        work = self.make_work(length)
        step_bytes: dict[str, int] = {}
        for variant in VARIANTS:
            if variant.name in self.too_large:
                continue
            try:
                step_bytes[variant.name] = self.warm_up(variant, work[0])
            except torch.OutOfMemoryError:
                self.too_large[variant.name] = f"out of memory at {length} tokens a row"
            if variant.name in self.too_large:
                # Half a backward pass has left its gradients in the engine.
                self.stages[variant.mode].close()
        seconds = self.take_turns([v for v in VARIANTS if v.name in step_bytes], work)
        for variant in VARIANTS:
            found = seconds.get(variant.name)
            line = self.blank(length, variant, self.too_large.get(variant.name))
            if found is not None:
                line |= self.numbers(length, variant, found, seconds.get(BASE))
                line |= self.memory(variant, step_bytes[variant.name])
            yield line

    def take_turns(self, variants: Sequence[StepVariant], work: Sequence[Work]) -> dict[str, np.ndarray]:
        """Seconds of every variant on every micro-batch; none where all of them together do not fit."""
        named = {variant.name: variant for variant in variants}
        try:
            return time_in_turns(
                {name: self.stages[variant.mode].run for name, variant in named.items()},
                work,
                self.args.seed,
                self.device,
                before=lambda name: self.stages[named[name].mode].prepare(named[name]),
            )
        except torch.OutOfMemoryError:
            self.too_large |= dict.fromkeys(named, "out of memory beside the others")
        for stage in self.stages.values():
            stage.close()
        return {}

    def make_work(self, length: int) -> list[Work]:
        """As many micro-batches as are timed."""
        rows = self.batch_tokens // length
        source = SyntheticRows.of_length(
            rows * self.args.repeats, length, self.shape.model["vocab_size"], self.args.seed
        )
        weights = np.full(rows, 1 / rows)
        chosen = np.arange(rows * self.args.repeats).reshape(-1, rows)
        return [Work(collate(source, one, weights, self.device), ends_step=True) for one in chosen]

    def warm_up(self, variant: StepVariant, work: Work) -> int:
        """Run once for what is compiled and allocated once, then again; what the step needs beyond the
        tensors that are there before it, in bytes."""
        stage = self.stages[variant.mode]
        stage.prepare(variant)
        stage.run(work)
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = allocated(self.device)
        stage.run(work)
        return torch.cuda.max_memory_allocated(self.device) - before

    def numbers(
        self, length: int, variant: StepVariant, seconds: np.ndarray, base: np.ndarray | None
    ) -> dict[str, object]:
        """Rates of one variant, and its ratios where the base ran."""
        rows = self.batch_tokens // length
        middle = float(np.median(seconds))
        flops = self.shape.flops(length, rows, variant.passes)
        spread = None if base is None else Spread.of(seconds, base)
        return {
            "tokens_per_s": rows * length / middle,
            "mfu": self.peak_tflops and flops / middle / (self.peak_tflops * 1e12),
            "ms_median": middle * 1000,
            **{f"ratio_{name}": spread and getattr(spread, name) for name in ("median", "p25", "p75")},
        }

    def memory(self, variant: StepVariant, step_bytes: int) -> dict[str, object]:
        """Of a process that did this alone: weights and optimizer, and a step's tensors at their most."""
        if self.device.type != "cuda":
            return {}
        state = self.stages[variant.mode].state_bytes
        sizes = {"step_mib": step_bytes, "state_mib": state, "peak_mib": step_bytes + state}
        return {name: size / MIB for name, size in sizes.items()}

    def blank(self, length: int, variant: StepVariant, note: str | None) -> dict[str, object]:
        """A line without numbers."""
        return dict.fromkeys(COLUMNS) | {
            "shape": self.name,
            "tokens_a_row": length,
            "variant": variant.name,
            "computes": variant.computes,
            "note": note,
            "rows": self.batch_tokens // length,
            "batch_tokens": self.batch_tokens,
            "repeats": self.args.repeats,
            "peak_tflops": self.peak_tflops,
            **self.constants,
        }

    def profile(self, length: int, out: Path) -> Iterator[Path]:
        """Write where the time of one probed step goes; gives the files."""
        work = self.make_work(length)[0]
        for variant in VARIANTS:
            if variant.name in PROFILED and variant.name not in self.too_large:
                stage = self.stages[variant.mode]
                stage.prepare(variant)
                stage.run(work)
                path = out / f"{file_name(self.name, self.device)}_{variant.name}_{length}_profile.txt"
                write_profile(path, lambda stage=stage: stage.run(work), self.device)
                yield path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the shapes asked for, write the CSV and print the table; the exit code."""
    args = parse(argv)
    if not (args.smoke or torch.cuda.is_available()):
        print("bench_step: nothing was run: torch finds no CUDA device")
        return 2
    ranks = Ranks.start(detect())
    deadline = time.monotonic() + args.seconds
    out = Path(args.out or (tempfile.mkdtemp() if args.smoke else Path(__file__).parent / "results"))
    lines: list[dict[str, object]] = []
    for shape in ("toy", "toy-bf16") if args.smoke else (args.shape,):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(shape, args, ranks, Path(folder))
            for length in args.lengths:
                late = time.monotonic() > deadline
                found = [bench.blank(length, v, "no time left") for v in VARIANTS] if late else None
                lines += found or list(bench.measure(length))
            if args.profile and time.monotonic() < deadline:
                print(*bench.profile(args.lengths[len(args.lengths) // 2], out), sep="\n")
            for stage in bench.stages.values():
                stage.close()
    path = out / f"{file_name('smoke' if args.smoke else args.shape, ranks.device)}.csv"
    write_csv(path, COLUMNS, lines)
    print(format_table(TABLE, lines))
    print(path)
    ranks.close()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --smoke changes the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [name for name in SHAPES if not name.startswith("toy")]
    parser.add_argument("--shape", choices=shapes, default=shapes[0])
    parser.add_argument(
        "--lengths", type=lambda text: [int(part) for part in text.split(",")], help="tokens a row"
    )
    parser.add_argument("--batch-tokens", type=int, help="tokens in a micro-batch; default: the shape's")
    parser.add_argument("--repeats", type=int, help="micro-batches that are timed at a length (12)")
    parser.add_argument("--peak-tflops", type=float, help="what the device can do, for MFU")
    parser.add_argument(
        "--profile", action="store_true", help="write where two probed steps spend their time"
    )
    parser.add_argument("--seconds", type=float, default=3600, help="no length is begun after this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    args = parser.parse_args(argv)
    args.lengths = args.lengths or list(SMOKE_LENGTHS if args.smoke else LENGTHS)
    args.repeats = args.repeats or (2 if args.smoke else 12)
    return args


def describe(shape: Shape) -> dict[str, object]:
    """How a shape is trained."""
    return {
        "model_params": shape.num_parameters,
        "checkpointing": shape.checkpointing,
        "adam": " ".join(f"{name}={value}" for name, value in shape.adam.items()),
        "bf16": " ".join(sorted(shape.bf16)) or "float32 masters and moments",
    }


def known_tflops(device: torch.device) -> float | None:
    """The device's rate by its name, if it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAK_TFLOPS.items() if known in name), None)


def file_name(shape: str, device: torch.device) -> str:
    """Of a result, without its ending."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"bench_step_{shape}_{re.sub(r'[^a-z0-9]+', '_', kind.lower()).strip('_')}"


if __name__ == "__main__":
    raise SystemExit(main())
