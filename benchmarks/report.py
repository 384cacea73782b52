"""Results as CSV, one line a measurement, with what is needed to trace it and to measure it again."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from grads_dist.runtime.rundir import atomic_write


def provenance(device: torch.device) -> dict[str, object]:
    """Hardware, versions and commit of this measurement."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpu_model": cpu_model(),
        **{name: metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with -dirty when a tracked file differs from it."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write the rows, whole or not at all; numbers with five digits, None as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(row[name]) for name in columns})


def format_table(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """The given columns in aligned text."""
    lines = [list(columns)] + [[_text(row[name], digits=3) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _text(value: object, digits: int = 5) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
