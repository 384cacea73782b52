"""Names of a sweep's shards: which rows of which unit each holds, so that a listing says what is done."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"(\d+)-(\d+)-(\d+)")


class Span(NamedTuple):
    """Rows `start` to `stop` of a unit of a frozen plan, by their place in the unit's order."""

    unit: int
    start: int
    stop: int


def span_name(span: Span, prefix: str = "") -> str:
    """What stands between `shard-` and the suffix of a file that holds these rows."""
    return f"{prefix}{span.unit:06d}-{span.start:06d}-{span.stop:06d}"


def find_spans(folder: Path, prefix: str, suffix: str) -> set[Span]:
    """The spans whose files are in `folder`, which may be missing; a file under its name is complete."""
    begin = f"shard-{prefix}"
    found = set()
    for path in folder.glob(f"{begin}*{suffix}"):
        match = _NAME.fullmatch(path.name[len(begin) : -len(suffix)])
        if match is not None:
            found.add(Span(*map(int, match.groups())))
    return found


def overlapping(spans: Collection[Span]) -> set[Span]:
    """Spans without which no row is in two of the others; the longest from the start stay."""
    found, unit, position = set(), -1, 0
    for span in sorted(spans, key=lambda span: (span.unit, span.start, -span.stop)):
        if span.unit != unit:
            unit, position = span.unit, 0
        if span.start < position:
            found.add(span)
        else:
            position = span.stop
    return found


def gaps(num_rows: int, unit_rows: int, done: Collection[Span]) -> list[Span]:
    """The rows that no span of `done` holds, of units of `unit_rows` rows each and a shorter last one.

    Raises ValueError for spans that overlap or lie outside their unit: they are of another plan.
    """
    by_unit: dict[int, list[Span]] = {}
    for span in sorted(done):
        by_unit.setdefault(span.unit, []).append(span)
    left = []
    for unit in range(-(-num_rows // unit_rows)):
        size = min(unit_rows, num_rows - unit * unit_rows)
        position = 0
        for span in by_unit.pop(unit, []):
            if span.start < position or not span.start < span.stop <= size:
                raise ValueError(f"rows {span.start} to {span.stop} of unit {unit}, which has {size} rows")
            if span.start > position:
                left.append(Span(unit, position, span.start))
            position = span.stop
        if position < size:
            left.append(Span(unit, position, size))
    if by_unit:
        raise ValueError(f"unit {min(by_unit)}, which the plan does not have")
    return left
