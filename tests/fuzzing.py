"""Runs the fuzz checks by kind of input: a few in the tests, thousands by benchmarks/fuzz.py."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_config
import fuzz_corpus
import fuzz_tables
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

Check = Callable[[Path, Any], dict[str, int]]
"""(an empty folder, a case) -> counts; fails where something does not hold."""


@dataclass(frozen=True)
class Kind:
    """One kind of hostile input."""

    strategy: st.SearchStrategy[Any]
    check: Check


def kinds(folder: Path) -> dict[str, Kind]:
    """All kinds, with what they share in `folder`."""
    model = fuzz_corpus.make_model(folder / "model")
    mark = folder / "unpickled"

    def corpus(place: Path, case: fuzz_corpus.Case) -> dict[str, int]:
        with fuzz_corpus.one_tokenizer(model):
            return fuzz_corpus.check_jsonl(place, model, case)

    def text_file(name: str) -> Check:
        def check(place: Path, case: tuple[str, bytes]) -> dict[str, int]:
            (place / name).write_bytes(case[1])
            with fuzz_corpus.one_tokenizer(model):
                return fuzz_tables.check_file(place, model, place / name, case[0])

        return check

    def table(place: Path, case: tuple[tuple[str, Any], str]) -> dict[str, int]:
        (row_format, rows), suffix = case
        if not fuzz_tables.write_table(rows, place / f"corpus{suffix}"):
            return {"not writable": 1}
        with fuzz_corpus.one_tokenizer(model):
            return fuzz_tables.check_file(place, model, place / f"corpus{suffix}", row_format)

    def select(place: Path, case: tuple[bytes, bytes | None, Any]) -> dict[str, int]:
        outcome = fuzz_tables.check_selection(place, *case)
        assert not mark.exists(), "features were unpickled"
        return _outcome(outcome)

    def configuration(check: Callable[[Path, Any], bool]) -> Check:
        def checked(place: Path, case: Any) -> dict[str, int]:
            with fuzz_config.one_parser():
                return _outcome(check(place, case))

        return checked

    suffixes = st.sampled_from([".parquet", ".arrow"])
    return {
        "jsonl": Kind(fuzz_corpus.cases(), corpus),
        "json": Kind(fuzz_tables.arrays(), text_file("corpus.json")),
        "csv": Kind(fuzz_tables.csv_files(), text_file("corpus.csv")),
        "table": Kind(st.tuples(fuzz_tables.tables(), suffixes), table),
        "config": Kind(fuzz_config.documents(), configuration(fuzz_config.check_document)),
        "flags": Kind(fuzz_config.flags(), configuration(fuzz_config.check_flags)),
        "deepspeed": Kind(fuzz_config.deepspeed_files(), configuration(fuzz_config.check_deepspeed)),
        "environment": Kind(
            fuzz_config.ENVIRONMENTS, lambda _, case: _outcome(fuzz_config.check_environment(case))
        ),
        "select": Kind(fuzz_tables.selection_cases(mark), select),
    }


def fuzz(
    kind: Kind,
    examples: int,
    number: int | None = None,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Counter[str]:
    """Check `examples` cases; returns the sums of their counts.

    number: seed of the cases; without one they are the same in every run.
    guard: what each case runs under.
    """
    counts: Counter[str] = Counter()

    def check(case: Any) -> None:
        place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            with guard():
                counts.update({"cases": 1, **kind.check(place, case)})
        finally:
            shutil.rmtree(place)

    chosen = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    test = chosen(given(kind.strategy)(check))
    (test if number is None else seed(number)(test))()
    return counts


def _outcome(is_used: bool) -> dict[str, int]:
    return {"used" if is_used else "refused": 1}
