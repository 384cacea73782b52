"""What a selection costs at corpus scale: seconds of every stage and peak memory.

    python benchmarks/bench_select.py                  10^5 .. 10^7 rows; about half an hour on 2 cores
    python benchmarks/bench_select.py --only score     one of the jobs: score, grads, picks
    python benchmarks/bench_select.py --smoke          a few seconds, to see that it works

`score` selects by the gradient criterion alone (signal, length adjustment, density, score, top-k) from a
table of two targets. `grads` is the default selection: k-nearest-neighbour graph, diversity, similarity
reduction. `picks` are the other picks and near-duplicates on the graph that `grads` left.

Every measurement is a process of its own, so that its peak memory is its own; tables and features are made
before (select_data.py), and read from disk as `grads-dist select` reads them. Repeats are whole selections;
the CSV has the median, the smallest and the largest of each stage. `peak_mib` is resident memory above that
of the imports, pages of the memory-mapped features included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from report import format_table, provenance, write_csv
from select_data import make_features, make_table
from timing import PeakMemory

from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.select import needed_columns, select
from grads_dist.similarity.config import SimilarityConfig

TARGETS = ["embedding", "lm_head"]
COLUMNS = (
    "job num_rows dim stage seconds_median seconds_min seconds_max repeats peak_mib num_selected recall "
    "index device threads cpu_model torch deepspeed transformers commit date"
).split()
TABLE = "job num_rows dim stage seconds_median seconds_min seconds_max peak_mib recall".split()
SIZES = {"score": [10**5, 10**6, 10**7], "grads": [10**5, 10**6], "picks": [10**5, 10**6]}
SMOKE_SIZES = {"score": [2000, 5000], "grads": [2000], "picks": [2000]}
NO_GRAPH = Weights(d=0.0, r=0.0)
VARIANTS = {
    "score": {"score": SelectionConfig(weights=NO_GRAPH)},
    "grads": {"grads": SelectionConfig()},
    "picks": {
        "mmr": SelectionConfig(pick="mmr"),
        "facility_location": SelectionConfig(pick="facility_location"),
        "cluster": SelectionConfig(pick="cluster"),
        "gumbel": SelectionConfig(pick="gumbel"),
        "dedup": SelectionConfig(dedup_threshold=0.95),
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, measure each job in processes of its own, write the CSV and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(SIZES), help="one job; default: all")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows; default: those of the job")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="of selections under 10^6 rows; else 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="keep tables and features here for the next time")
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        _measure(args.measure[0], Path(args.measure[1]), args.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary, "data")
        rows = []
        for job in [args.only] if args.only else list(SIZES):
            for num_rows in args.rows or (SMOKE_SIZES if args.smoke else SIZES)[job]:
                rows += _run(job, num_rows, args, data)
        default = temporary if args.smoke else Path(__file__).parent / "results"
        write_csv(Path(args.out or default, "select_scale_cpu.csv"), COLUMNS, rows)
    print(format_table(TABLE, rows))


def _run(job: str, num_rows: int, args: argparse.Namespace, data: Path) -> list[dict[str, object]]:
    """All variants of a job at one size, each repeat a process."""
    folder = data / f"{num_rows}x{args.dim}"
    _make(folder, num_rows, args.dim, with_features=job != "score")
    lines: list[dict[str, object]] = []
    torch.set_num_threads(args.threads)
    about = provenance(torch.device("cpu"))
    for variant in VARIANTS[job]:
        repeats = args.repeats if num_rows < 10**6 and not args.smoke else 1
        found = []
        for _ in range(repeats):
            if job == "grads":
                shutil.rmtree(folder / "graph", ignore_errors=True)
            found.append(_measured(variant, folder, args.threads))
        stages = {stage: [one["seconds"][stage] for one in found] for stage in found[0]["seconds"]}
        for stage, seconds in stages.items():
            lines.append(
                {
                    "job": variant,
                    "num_rows": num_rows,
                    "dim": 0 if job == "score" else args.dim,
                    "stage": stage,
                    "seconds_median": float(np.median(seconds)),
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "repeats": repeats,
                    "peak_mib": max(one["peak_mib"] for one in found),
                    "num_selected": found[0]["num_selected"],
                    "recall": found[0]["recall"],
                    "index": found[0]["index"],
                    **about,
                }
            )
    return lines


def _make(folder: Path, num_rows: int, dim: int, with_features: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "scores.parquet").exists():
        pq.write_table(make_table(num_rows, 0, TARGETS), folder / "scores.parquet")
    if with_features and not (folder / "features.npy").exists():
        make_features(folder / "features.npy", num_rows, dim, 0)


def _measured(variant: str, folder: Path, threads: int) -> dict:
    command = [sys.executable, __file__, "--threads", str(threads), "--measure", variant, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(variant: str, folder: Path, threads: int) -> None:
    """One selection in this process; prints what it took."""
    torch.set_num_threads(threads)
    config = next(variants[variant] for variants in VARIANTS.values() if variant in variants)
    memory = PeakMemory(torch.device("cpu"))
    start = time.perf_counter()
    columns = needed_columns(config, TARGETS)
    table = pq.read_table(folder / "scores.parquet", columns=columns)
    read = time.perf_counter() - start
    features = None
    if config.weights != NO_GRAPH:
        features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    chosen = select(
        table, features, config, SimilarityConfig(device="cpu"), TARGETS, graph_folder=folder / "graph"
    )
    seconds = {"read": read, **chosen.summary["seconds"], "all": time.perf_counter() - start}
    search = chosen.summary["neighbours"] or {}
    result = {
        "seconds": seconds,
        "peak_mib": memory.mib(),
        "num_selected": int(chosen.selected.sum()),
        "recall": search.get("recall"),
        "index": search.get("index"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
