"""Draws what ways to per-sample gradients cost against a plain pass: docs/images/neighbours.svg.

    python benchmarks/plot_costs.py

Reads what bench_neighbours.py left in benchmarks/results. Needs the extra `benchmarks`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "bench_neighbours_cpu.csv"
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "neighbours.svg"
COLOURS = {"frozen": "tab:blue", "opacus": "tab:orange", "bergson": "tab:green"}
"""By how a variant's name begins; the others are grey."""


def main() -> None:
    with RESULTS.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["ratio_median"]]
    # The last line is drawn at the bottom.
    lines.reverse()
    middle = [float(line["ratio_median"]) for line in lines]
    below = [m - float(line["ratio_p25"]) for m, line in zip(middle, lines, strict=True)]
    above = [float(line["ratio_p75"]) - m for m, line in zip(middle, lines, strict=True)]
    colours = [COLOURS.get(line["variant"].split("-")[0], "tab:gray") for line in lines]
    plt.rcParams["svg.hashsalt"] = "grads_dist"
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    axis.barh([line["variant"] for line in lines], middle, xerr=[below, above], color=colours, capsize=2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xlabel="time of a micro-batch over that of a plain pass: median and quartiles")
    axis.grid(True, axis="x", alpha=0.3)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})


if __name__ == "__main__":
    main()
