"""Memory of a probe over a long time: it must not grow.

    python benchmarks/soak.py --minutes 30 --preload libjemalloc.so.2

Two processes probe without pause, one in frozen mode and one in train mode (ZeRO-2, a rank each), while the
anonymous memory that each holds is read every second. After a warm-up of a fifth of the time, the median of
the last fifth may be 2 % above that of the first fifth. In the end both are asked to stop.

On a CPU tensors lie in the heap of the C library, and glibc's grows where aligned blocks of many sizes come
and go (its bug 14581): what is in use does not grow, but the holes between do. So the allocator is an option.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from reliability import ROOT, Start, arguments, make_workspace, results_folder
from report import provenance, write_csv

WARM_UP = 0.2
WINDOW = 0.2
"""Of the time: rows of all lengths come several times in it, also where other programs run beside it."""
ALLOWED_GROWTH = 0.02
ROWS_PER_SECOND = 100
"""More than one thread probes of this model, so that the corpus lasts."""
ROWS_WRITTEN = 500
"""Rows of one JSON file that differ; the corpus repeats them."""
SHOWN_EVERY = 15
"""Seconds between two lines of the CSV."""
START_WITHIN = 900.0
STOP_WITHIN = 120.0
MODEL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
SHARED = {"probe__batch_tokens": 256, "probe__global_batch": 8, "probe__shard_rows": 128}
"""In frozen mode rows come by length within 16 shards, so that the warm-up sees all lengths many times."""
MODES: dict[str, tuple[int, dict[str, object]]] = {
    "frozen": (0, {"probe__mode": "frozen"}),
    # Without features, whose own pass would take a part of the time.
    "train": (2, {"probe__mode": "train", "probe__features": "none"}),
}
COLUMNS = ("mode", "seconds", "rss_anon_mib")
IMAGE = ROOT / "docs" / "images" / "soak.svg"


@dataclass
class Soak:
    """One process and its memory over time."""

    mode: str
    run: Path
    started: Start
    begun: float | None = None
    """When it had written its first shard."""
    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Take a sample, if the probe is at work. Raises RuntimeError if the process has ended."""
        if not self.started.alive():
            raise RuntimeError(
                f"{self.mode}: ended with {self.started.codes()}\n{self.started.output()[-3000:]}"
            )
        if self.begun is None and next(self.run.glob("scores/shard-*"), None) is not None:
            self.begun = time.monotonic()
        if self.begun is not None:
            self.seconds.append(time.monotonic() - self.begun)
            self.mib.append(_rss_anon_mib(self.started.processes[0].pid))

    def lasts(self, seconds: float) -> bool:
        """Whether there are not yet so many seconds of samples."""
        return not self.seconds or self.seconds[-1] < seconds

    def stop(self) -> int | None:
        """Ask the process to stop; returns its exit code, None if it had to be killed."""
        self.started.processes[0].send_signal(signal.SIGTERM)
        in_time = self.started.wait(STOP_WITHIN) is not None
        self.started.kill()
        return self.started.codes()[0] if in_time else None

    def num_rows(self) -> int:
        """Rows that it has probed and written."""
        return sum(pq.read_metadata(path).num_rows for path in self.run.glob("scores/shard-*.parquet"))


@dataclass(frozen=True)
class Growth:
    """How memory changed after the warm-up."""

    first_mib: float
    last_mib: float
    slope_mib_per_hour: float

    @property
    def share(self) -> float:
        """Growth relative to what there was."""
        return self.last_mib / self.first_mib - 1


def measure_growth(seconds: np.ndarray, mib: np.ndarray) -> Growth:
    """Medians of the first and the last window after the warm-up, and the slope of a line through all."""
    share = seconds / seconds[-1]
    kept = share >= WARM_UP
    slope = np.polyfit(seconds[kept] / 3600, mib[kept], 1)[0] if kept.sum() > 1 else 0.0
    first = np.median(mib[kept & (share <= WARM_UP + WINDOW)])
    last = np.median(mib[share >= 1 - WINDOW])
    return Growth(float(first), float(last), float(slope))


def _rss_anon_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def make_corpus(folder: Path, seconds: float) -> None:
    """A workspace with more rows than are probed in so many seconds."""
    make_workspace(folder, ROWS_WRITTEN, **MODEL)
    lines = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number in range(int(seconds * ROWS_PER_SECOND) + 4 * ROWS_WRITTEN):
            row = {**rows[number % len(rows)], "id": f"row{number}"}
            file.write(json.dumps(row) + "\n")


def start(folder: Path, mode: str, preload: str) -> Soak:
    """Start a probe; the tokens are those of the other one, if it has made them."""
    stage, options = MODES[mode]
    run = folder / mode
    shared = {**SHARED, "data__cache_dir": folder / "cache"}
    args = ["probe", *arguments(folder, run, stage, **shared, **options)[1:]]
    variables = {"LD_PRELOAD": preload} if preload else {}
    return Soak(mode, run, Start(args, 1, False, folder / "starts" / mode, variables=variables))


def soak(folder: Path, seconds: float, preload: str) -> list[Soak]:
    """Probe in both modes for so long. Raises RuntimeError if a process ends, or does not begin."""
    make_corpus(folder, seconds)
    soaks: list[Soak] = []
    begin = time.monotonic()
    try:
        while len(soaks) < len(MODES) or any(each.lasts(seconds) for each in soaks):
            if not soaks or (len(soaks) < len(MODES) and soaks[-1].begun is not None):
                soaks.append(start(folder, list(MODES)[len(soaks)], preload))
            for each in soaks:
                if each.lasts(seconds):
                    each.look()
            if time.monotonic() - begin > START_WITHIN and any(each.begun is None for each in soaks):
                raise RuntimeError(f"no probe began within {START_WITHIN:.0f} s")
            time.sleep(1)
        return soaks
    finally:
        codes = {each.mode: each.stop() for each in soaks}
        print("exit codes after SIGTERM:", codes)


def tell(soaks: list[Soak], judged: bool) -> tuple[str, bool]:
    """A line a mode, a closing line, and whether all is well."""
    lines, good = [], True
    for each in soaks:
        found = measure_growth(np.array(each.seconds), np.array(each.mib))
        good &= found.share <= ALLOWED_GROWTH
        lines.append(
            f"{each.mode}: {found.first_mib:.1f} MiB after the warm-up, {found.last_mib:.1f} MiB in the end "
            f"({100 * found.share:+.2f} %), {found.slope_mib_per_hour:+.2f} MiB/hour; "
            f"{each.num_rows()} rows in {each.seconds[-1]:.0f} s"
        )
    verdict = ("pass" if good else "FAIL") if judged else "pass (growth is not judged in so short a time)"
    return "\n".join([*lines, f"soak: {verdict}"]), good or not judged


def plot(lines: Sequence[Mapping[str, object]], path: Path) -> None:
    """Draw the lines of the CSV, where matplotlib is there."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    pyplot.rcParams["svg.hashsalt"] = "grads_dist"
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for mode in MODES:
        own = [line for line in lines if line["mode"] == mode]
        minutes = [float(str(line["seconds"])) / 60 for line in own]
        axes.plot(minutes, [float(str(line["rss_anon_mib"])) for line in own], label=f"{mode} mode")
    axes.set(xlabel="minutes", ylabel="anonymous memory, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def _lines(soaks: list[Soak], told: Mapping[str, object]) -> list[dict[str, object]]:
    return [
        {"mode": each.mode, "seconds": each.seconds[k], "rss_anon_mib": each.mib[k], **told}
        for each in soaks
        for k in range(0, len(each.seconds), SHOWN_EVERY)
    ]


def main() -> int:
    """Probe, write the samples, print what became of memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--preload", default="", help="library of another allocator, as LD_PRELOAD takes it")
    parser.add_argument("--folder", type=Path, help="keep the runs here; else removed")
    parser.add_argument("--smoke", action="store_true", help="20 seconds, to see that it works")
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV; default: benchmarks/results, none in smoke"
    )
    options = parser.parse_args()
    told = {"preload": options.preload, **provenance(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soaks = soak(folder, 20 if options.smoke else 60 * options.minutes, options.preload)
        text, good = tell(soaks, judged=not options.smoke)
        out = results_folder(options.out, options.smoke, Path(temporary))
        lines = _lines(soaks, told)
        write_csv(out / "soak.csv", [*COLUMNS, *told], lines)
    if not options.smoke:
        plot(lines, IMAGE)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
