"""How far `grads-dist estimate --calibrate` is from the probe that it is about, in time and in memory.

    python benchmarks/bench_estimate.py            the demo's corpus and model, minutes a configuration
    python benchmarks/bench_estimate.py --smoke    toy sizes, to see that it works

For each configuration the estimate is made first, in a process of its own, then `grads-dist probe` runs for
real in another; both tokenize anew. A third process makes the estimate again by processor time, which is held
against that of the real run: on a machine that others use as well it tells the estimate's own error from that
of a load that comes and goes. The memory is the largest resident memory of the probe above what its
imports take, and is held against the estimate's figure for a rank of a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from report import format_table, provenance, write_csv
from timing import PeakMemory

from grads_dist.config import Config, load_config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.demo.assets import Assets, Stopwatch, build_assets
from grads_dist.demo.size import TINY, DemoSize
from grads_dist.estimate.estimate import measure
from grads_dist.estimate.options import Options
from grads_dist.model.config import ModelConfig
from grads_dist.probe.config import ProbeConfig

log = logging.getLogger("bench_estimate")

PAPER = ["embedding", "lm_head"]
CONFIGURATIONS = {
    "frozen": {"mode": "frozen", "targets": PAPER},
    "train": {"mode": "train", "targets": PAPER},
    "frozen-linear": {"mode": "frozen", "targets": ["linear"]},
}
LAYOUTS = {"frozen": "frozen, whole on each rank", "train": "ZeRO-2"}
"""Of the estimate's memory, by mode: those of a run without a DeepSpeed file."""

COLUMNS = (
    "configuration repeat estimated_s real_s ratio estimated_cpu_s real_cpu_s cpu_ratio start_s "
    "features_s probe_s estimated_mib real_mib "
    "memory_ratio load_estimate load_real rows tokens estimated_tokens batch_tokens model_params device "
    "threads cpu_model torch deepspeed transformers commit date"
).split()
TABLE = (
    "configuration repeat estimated_s real_s ratio estimated_cpu_s real_cpu_s cpu_ratio "
    "estimated_mib real_mib load_estimate load_real"
).split()
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Estimate and run every configuration, write the CSV and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3000, help="rows of the corpus")
    parser.add_argument("--sample", type=int, default=500, help="rows that the estimate tokenizes")
    parser.add_argument("--repeats", type=int, default=1, help="estimates and runs of each configuration")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the kernels")
    parser.add_argument("--only", choices=CONFIGURATIONS, help="one configuration alone")
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--by-processor-time", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    if args.one:
        run_and_measure(Path(args.one))
        return
    if args.by_processor_time:
        config = load_config(Path(args.by_processor_time))
        found = measure(config, Options(sample=args.sample, calibrate=True), processor_seconds)
        print(json.dumps(found["calibration"]["total"]))
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare_all(Path(folder), args)
    out = Path(args.out or (tempfile.mkdtemp() if args.smoke else Path(__file__).parent / "results"))
    path = out / f"estimate_{'smoke' if args.smoke else 'cpu'}.csv"
    write_csv(path, COLUMNS, rows)
    print(format_table(TABLE, rows))
    print(path)


def compare_all(folder: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    """One row of results for each configuration and repeat."""
    size = TINY if args.smoke else replace(DemoSize(), pretrain_steps=60)
    num_rows = 60 if args.smoke else args.rows
    assets = build_assets(folder / "assets", size, Stopwatch())
    names = [args.only] if args.only else list(CONFIGURATIONS)
    return [
        compare(name, repeat, folder, assets, size, num_rows, args)
        for repeat in range(1 if args.smoke else args.repeats)
        for name in names
    ]


def compare(
    name: str,
    repeat: int,
    folder: Path,
    assets: Assets,
    size: DemoSize,
    num_rows: int,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Estimate a configuration, run it, and put both side by side."""
    where = folder / f"{name}-{repeat}"
    where.mkdir()
    config = where / "config.yaml"
    save_config(config_of(name, where, assets, size, num_rows), config)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    load_estimate = os.getloadavg()[0]
    command = [
        sys.executable,
        "-m",
        "grads_dist",
        "estimate",
        "--config",
        str(config),
        "--calibrate",
        "--json",
    ]
    command += ["--sample", str(args.sample)]
    estimate = json.loads(_output(command, environment))
    load_real = os.getloadavg()[0]
    start, before = time.perf_counter(), processor_seconds()
    real = json.loads(_output([sys.executable, __file__, "--one", str(config)], environment).splitlines()[-1])
    seconds, processor = time.perf_counter() - start, processor_seconds() - before
    command = [sys.executable, __file__, "--by-processor-time", str(config), "--sample", str(args.sample)]
    shutil.rmtree(where / "cache")
    by_processor = float(_output(command, environment).splitlines()[-1])
    timed, layout = estimate["calibration"], LAYOUTS[str(CONFIGURATIONS[name]["mode"])]
    needed = next(part for part in estimate["memory"]["layouts"] if part["name"] == layout)
    log.info("%s: estimated %.1f s, took %.1f s", name, timed["total"], seconds)
    log.info("%s: estimated %.1f s of processor time, took %.1f s", name, by_processor, processor)
    return {
        "configuration": name,
        "repeat": repeat,
        "estimated_s": timed["total"],
        "real_s": seconds,
        "ratio": timed["total"] / seconds,
        "estimated_cpu_s": by_processor,
        "real_cpu_s": processor,
        "cpu_ratio": by_processor / processor,
        "start_s": timed["start"],
        "features_s": timed["passes"].get("features"),
        "probe_s": timed["passes"]["probe"],
        "estimated_mib": needed["total"] / 2**20,
        "real_mib": real["peak_mib"],
        "memory_ratio": needed["total"] / 2**20 / real["peak_mib"],
        "load_estimate": load_estimate,
        "load_real": load_real,
        "rows": estimate["corpus"]["rows"],
        "tokens": real["tokens"],
        "estimated_tokens": estimate["corpus"]["tokens"],
        "batch_tokens": estimate["plan"]["batch_tokens"],
        "model_params": estimate["model"]["parameters"],
        **provenance(CPU),
    }


def config_of(name: str, where: Path, assets: Assets, size: DemoSize, num_rows: int) -> Config:
    """The configuration, with caches and output of its own."""
    data = DataConfig(
        path=str(assets.corpus), max_length=size.max_length, limit=num_rows, cache_dir=str(where / "cache")
    )
    probe = ProbeConfig(
        global_batch=size.global_batch,
        batch_tokens=size.batch_tokens,
        **CONFIGURATIONS[name],  # type: ignore[arg-type]
    )
    model = ModelConfig(name_or_path=str(assets.model), dtype="float32")
    return Config(model=model, data=data, probe=probe, output_dir=str(where / "run"))


def processor_seconds() -> float:
    """User and system time of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_and_measure(config_path: Path) -> None:
    """`grads-dist probe` in this process; prints its peak memory and what it read as JSON."""
    import pyarrow.parquet as pq

    from grads_dist.cli import main as program
    from grads_dist.pipeline import probe  # noqa: F401  # before the baseline is taken
    from grads_dist.probe import run  # noqa: F401

    config = load_config(config_path)
    if config.probe.mode == "train":
        import deepspeed  # noqa: F401
    peak = PeakMemory(CPU)
    code = program(["probe", "--config", str(config_path)])
    if code:
        sys.exit(code)
    found = peak.mib()
    table = pq.read_table(Path(config.output_dir, "scores.parquet"), columns=["num_tokens"])
    print(json.dumps({"peak_mib": found, "tokens": int(table.column("num_tokens").to_numpy().sum())}))


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
