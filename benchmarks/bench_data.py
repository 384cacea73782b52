"""What the data stage costs at corpus scale: seconds of every step, and memory of every process.

    python benchmarks/bench_data.py            10^4 .. 10^6 rows; about half an hour on 2 cores
    python benchmarks/bench_data.py --smoke    to see that it works

Every measurement is a process of its own (data_steps.py). `open` finds, hashes and indexes the files,
`reopen` does it again from the cache. `tokenize` is from rows to the store, with the loading of the tokenizer
and the start of the processes. `map` is what one would use instead: `datasets.Dataset.map`, batched, over
`apply_chat_template` with the mask of the assistant's tokens; its tokens and masks are compared with the
store's. Reading the file into the dataset (`load_dataset`) is timed apart. `train` and `frozen` are what a
rank does apart from the model, with a store of drawn tokens: open it, make the plan, and collate all of its
micro-batches.

Processor time is that of the process and of those it starts; it says more than seconds where other programs
are busy. Memory: see memory_watch.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from chat_corpus import make_tokenizer, write_jsonl, write_parquet
from drawn_store import make_store
from report import format_table, provenance, write_csv

COLUMNS = (
    "step files num_rows processes seconds seconds_min seconds_max repeats cpu_seconds rows_per_s "
    "rows_per_cpu_s tokens_per_s num_tokens disk_bytes anon_peak_mib anon_end_mib file_mib child_peak_mib "
    "device threads cpu_model torch deepspeed transformers datasets tokenizers commit date"
).split()
TABLE = (
    "step files num_rows processes seconds cpu_seconds rows_per_s rows_per_cpu_s anon_peak_mib anon_end_mib "
    "child_peak_mib"
).split()
FILES = {"1 jsonl": 1, "200 jsonl": 200, "1 parquet": 1}
SIZES, SMOKE_SIZES = [10**4, 10**5, 10**6], [200, 400]
ALL_BELOW, REPEATED_BELOW = 10**5, 10**6
"""Below the first all kinds of files and numbers of processes; below the second the rival, and repeats."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the corpora, measure each step in processes of its own, write the CSV and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", help="of corpora; default: 10^4, 10^5, 10^6")
    parser.add_argument("--stores", type=int, nargs="+", help="rows of stores; default: 10^4, 10^5, 10^6")
    parser.add_argument("--repeats", type=int, default=2, help="of what is compared, in turns")
    parser.add_argument("--data", type=Path, help="folder for corpora and caches; default: a temporary one")
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats = 1
    about = provenance(torch.device("cpu"))
    about |= {name: metadata.version(name) for name in ("datasets", "tokenizers")}
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary, "data")
        rows = []
        for num_rows in args.rows or (SMOKE_SIZES if args.smoke else SIZES):
            rows += [row | about for row in measure_size(data, num_rows, args.repeats)]
        for num_rows in args.stores or (SMOKE_SIZES if args.smoke else SIZES):
            rows += [row | about for row in measure_rank(data, num_rows)]
        default = temporary if args.smoke else Path(__file__).parent / "results"
        write_csv(Path(args.out or default, "data_cpu.csv"), COLUMNS, rows)
    print(format_table(TABLE, rows))


def measure_size(data: Path, num_rows: int, repeats: int) -> list[dict[str, object]]:
    """All steps at one size; what is compared is repeated in turns."""
    folder = data / str(num_rows)
    make_corpora(folder, num_rows)
    kinds = [("1 jsonl", 2)]
    if num_rows < ALL_BELOW:
        kinds += [("1 jsonl", 1), ("200 jsonl", 2), ("1 parquet", 2)]
    steps = [("open", files, 1) for files in FILES] + [("tokenize", *kind) for kind in kinds]
    if num_rows < REPEATED_BELOW:
        steps += [("map", *kind) for kind in kinds if kind[0] == "1 jsonl"]
    found: dict[tuple[str, str, int], list[dict]] = {}
    for _ in range(repeats if num_rows < REPEATED_BELOW else 1):
        for step in steps:
            for one in measured(folder, *step):
                found.setdefault((one.pop("step", step[0]), *step[1:]), []).append(one)
    return [line(key, num_rows, results) for key, results in found.items()]


def measure_rank(data: Path, num_rows: int) -> list[dict[str, object]]:
    """What a rank does with a store of so many rows."""
    folder = data / f"store {num_rows}"
    if not folder.exists():
        make_store(folder, num_rows)
    found = [one for step in ("train", "frozen") for one in measured(folder, step, "", 1)]
    return [line((one.pop("step"), "store", 1), num_rows, [one]) for one in found]


def make_corpora(folder: Path, num_rows: int) -> None:
    """The corpus in all its forms, and the tokenizer, unless they are there."""
    if not (folder / "1 jsonl").exists():
        write_jsonl(folder / "1 jsonl", num_rows, 1)
        write_jsonl(folder / "200 jsonl", num_rows, 200)
        write_parquet(folder / "1 parquet", num_rows)
        make_tokenizer(folder / "tokenizer")


def line(key: tuple[str, str, int], num_rows: int, results: list[dict]) -> dict[str, object]:
    """One line of the CSV: medians, and the spread of the seconds."""
    seconds = [one["seconds"] for one in results]
    median = float(np.median(seconds))
    num_tokens = results[0].get("num_tokens")
    used = [one["cpu_seconds"] for one in results if "cpu_seconds" in one]
    cpu = float(np.median(used)) if used else None
    names = "disk_bytes anon_peak_mib anon_end_mib file_mib child_peak_mib".split()
    return {
        **dict(zip(("step", "files", "processes"), key, strict=True)),
        "num_rows": num_rows,
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "repeats": len(results),
        "cpu_seconds": cpu,
        "rows_per_s": num_rows / median,
        "rows_per_cpu_s": num_rows / cpu if cpu else None,
        "tokens_per_s": num_tokens / median if num_tokens else None,
        "num_tokens": num_tokens,
        **{name: max((one[name] for one in results if name in one), default=None) for name in names},
    }


def measured(folder: Path, step: str, files: str, processes: int) -> list[dict]:
    """What a step took, in a process of its own; some steps give several results."""
    asked = {"step": step, "folder": str(folder), "files": files, "processes": processes}
    command = [sys.executable, str(Path(__file__).with_name("data_steps.py")), json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
