"""Hostile corpora, configuration, tables and launcher variables by the thousand: no traceback, no hang.

    python benchmarks/fuzz.py --rows 20000 --cases 2000 --seed 0

Corpora of JSON lines are generated until `--rows` rows went through the data stage, each once among the
usable or the rejected; of every other kind there are `--cases` cases. A case that takes longer than
`--seconds` counts as a hang. Ends with code 1 at the first case that fails, shrunk to a small one; prints
counts as CSV: of rows that were kept, of inputs that were used, and of those refused in one line.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzzing import fuzz, kinds  # noqa: E402  -- the package and the tests need not be installed

COLUMNS = ("kind", "cases", "rows", "kept", "used", "refused", "files refused", "seconds")
CASES_AT_ONCE = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of JSON lines")
    parser.add_argument("--cases", type=int, default=2_000, help="cases of every other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="longest time of one case")
    parser.add_argument("--only", help="one kind")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(",".join(COLUMNS))

    @contextmanager
    def guard() -> Iterator[None]:
        signal.setitimer(signal.ITIMER_REAL, args.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for name, kind in kinds(Path(folder)).items():
            if args.only not in (None, name):
                continue
            start, counts, number = time.perf_counter(), Counter[str](), args.seed
            while counts["rows"] < args.rows if name == "jsonl" else counts["cases"] < args.cases:
                left = CASES_AT_ONCE if name == "jsonl" else min(CASES_AT_ONCE, args.cases - counts["cases"])
                counts += fuzz(kind, left, number, guard)
                number += 1000
            shown = {"kind": name, **counts, "seconds": round(time.perf_counter() - start, 1)}
            print(",".join(str(shown.get(column, "")) for column in COLUMNS), flush=True)
    return 0


def _hang(*_: object) -> None:
    raise AssertionError("a case takes too long")


if __name__ == "__main__":
    sys.exit(main())
