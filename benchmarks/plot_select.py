"""Draws how a selection's time and memory grow with the rows: docs/images/select_scale.svg.

    python benchmarks/plot_select.py

Reads what bench_select.py left in benchmarks/results. Needs the extra `benchmarks`.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "select_scale_cpu.csv"
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "select_scale.svg"
LABELS = {"score": "G alone", "grads": "default, graph included"}


def main() -> None:
    with RESULTS.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["stage"] == "all"]
    seconds, memory = defaultdict(list), defaultdict(list)
    for line in lines:
        rows = int(line["num_rows"])
        seconds[line["job"]].append((rows, float(line["seconds_median"])))
        memory[line["job"]].append((rows, float(line["peak_mib"]) / 1024))
    plt.rcParams["svg.hashsalt"] = "grads_dist"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, series, unit in ((axes[0], seconds, "seconds"), (axes[1], memory, "GiB")):
        for job, points in sorted(series.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=LABELS.get(job, job))
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=unit)
        axis.grid(True, which="major", alpha=0.3)
    axes[1].legend(fontsize="small", ncols=2)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})


if __name__ == "__main__":
    main()
