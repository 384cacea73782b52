"""What statistics of each kind of target add to the peak memory of training, at the same batch.

    python benchmarks/bench_memory.py            random models of 5M to 17M parameters, in fresh processes
    python benchmarks/bench_memory.py --smoke    toy sizes, to see that it works

Each measurement is a process of its own: build, then run a few micro-batches and one optimizer step. `plain`
is a DeepSpeed step around the model's own loss; `none` is the probe's training step without statistics, which
forms logits at label positions only; the others are that step with the statistics of one kind of target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from report import format_table, provenance, write_csv
from timing import PeakMemory
from variants import Setup, plain_step, training_step
from workload import SMOKE, Size, micro_batches, save_random_adapter, save_random_model, synthetic_rows

from grads_dist.model.load import load_model
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks

KINDS = {
    "llama": ["embedding", "lm_head", "layers", "linear", "norms"],
    "gpt2": ["tied", "biases"],
    "mixtral": ["experts", "layers"],
    "llama-lora": ["adapters"],
}
"""Models and the kinds of target that are measured on each."""
COLUMNS = (
    "model target peak_mib over_plain_mib ratio_to_plain over_none_mib peak_min_mib peak_max_mib repeats "
    "model_params batch_tokens global_batch device threads cpu_model torch deepspeed transformers commit date"
).split()
TABLE = "model target peak_mib over_plain_mib ratio_to_plain over_none_mib".split()
NUM_MICRO_BATCHES = 3
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all kinds, write the CSV and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes a measurement; the median counts")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="padded tokens in a micro-batch")
    parser.add_argument("--global-batch", type=int, default=64, help="samples in a step")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, two kinds; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    parser.add_argument("--one", nargs=2, metavar=("TARGET", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(*args.one, args)))
        return
    rows = [
        row for model in KINDS for row in measure_model(model, args) if not args.smoke or model == "llama"
    ]
    out = Path(args.out or (tempfile.mkdtemp() if args.smoke else Path(__file__).parent / "results"))
    path = out / f"bench_memory_{'smoke' if args.smoke else 'cpu'}.csv"
    write_csv(path, COLUMNS, rows)
    print(format_table(TABLE, rows))
    print(path)


def measure_model(model: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """One row of results for each kind of target on one model."""
    with tempfile.TemporaryDirectory() as folder:
        size = SMOKE if args.smoke else Size()
        save_random_model(Path(folder), size, 0, model.removesuffix("-lora"))
        if model.endswith("-lora"):
            save_random_adapter(Path(folder), Path(folder, "adapter"))
        targets = ["plain", "none", *(KINDS[model][:1] if args.smoke else KINDS[model])]
        peaks = {target: repeat(target, folder, args) for target in targets}
        num_params = load_model(setup_of(folder, args).model_config, torch.float32, CPU).num_parameters()
    constants = {**provenance(CPU), "model_params": num_params, "repeats": args.repeats}
    constants |= {"batch_tokens": args.batch_tokens, "global_batch": args.global_batch}
    middle = {target: statistics.median(values) for target, values in peaks.items()}
    return [
        {
            "model": model,
            "target": target,
            "peak_mib": middle[target],
            "over_plain_mib": middle[target] - middle["plain"],
            "ratio_to_plain": middle[target] / middle["plain"],
            "over_none_mib": middle[target] - middle["none"],
            "peak_min_mib": min(values),
            "peak_max_mib": max(values),
            **constants,
        }
        for target, values in peaks.items()
    ]


def repeat(target: str, folder: str, args: argparse.Namespace) -> list[float]:
    """Peaks of several fresh processes, in MiB."""
    command = [sys.executable, __file__, "--one", target, folder, "--threads", str(args.threads)]
    command += ["--batch-tokens", str(args.batch_tokens), "--global-batch", str(args.global_batch)]
    command += ["--smoke"] * args.smoke
    runs = [
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for _ in range(1 if args.smoke else args.repeats)
    ]
    return [float(json.loads(run.stdout.splitlines()[-1])) for run in runs]


def setup_of(folder: str, args: argparse.Namespace) -> Setup:
    """Of the model in `folder`, with the adapter beside it if there is one."""
    adapter = Path(folder, "adapter")
    found = str(adapter) if adapter.is_dir() else None
    return Setup(folder, args.global_batch, args.batch_tokens, Ranks.start(detect()), found)


def measure(target: str, folder: str, args: argparse.Namespace) -> float:
    """Peak memory of this process above what the imports take, in MiB."""
    import deepspeed  # noqa: F401  # before the baseline is taken

    setup = setup_of(folder, args)
    size = SMOKE if args.smoke else Size()
    rows, lengths = synthetic_rows(args.global_batch, size, folder, 0)
    work = micro_batches(rows, lengths, args.global_batch, args.batch_tokens, 0, CPU)
    peak = PeakMemory(CPU)
    if target == "plain":
        step = plain_step(setup)
    else:
        step = training_step(setup, ["lm_head"] if target == "none" else [target], record=target != "none")
    for item in [*work[: NUM_MICRO_BATCHES - 1], work[-1]]:
        step(item)
    setup.ranks.close()
    return peak.mib()


if __name__ == "__main__":
    main()
