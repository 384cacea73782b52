"""A corpus of real instruction pairs that needs no download: what something does, as its docstring says."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grads_dist.demo.docstrings import Definition
from grads_dist.errors import DataError

MIN_ANSWER_CHARS = 12


def build_rows(definitions: Iterable[Definition], max_answer_chars: int) -> list[dict[str, Any]]:
    """Return a row for each definition whose docstring yields an answer, in the order of `definitions`.

    A row is `{"id": qualified name, "messages": [user, assistant]}`. Nothing is removed for being said twice:
    where a package repeats a helper word for word, rows repeat too, as they do in any corpus.
    """
    answers = ((definition, shorten(definition.docstring, max_answer_chars)) for definition in definitions)
    return [_row(definition, answer) for definition, answer in answers if _is_usable(answer)]


def split_rows(rows: Sequence[dict[str, Any]], num_rows: int) -> tuple[list[dict], list[dict]]:
    """Return (corpus of `num_rows` rows, the rows left over), both in their original order.

    The corpus takes the rows with the smallest hash of their id, spread over the packages and barely
    changed by their versions. Raises DataError when no row would be left over.
    """
    if len(rows) <= num_rows:
        raise DataError(f"the demo needs more than {num_rows} docstrings, but only {len(rows)} were found")
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i]["id"].encode()).digest())
    chosen = set(order[:num_rows])
    return (
        [row for i, row in enumerate(rows) if i in chosen],
        [row for i, row in enumerate(rows) if i not in chosen],
    )


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write `rows` as JSON lines in UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def shorten(docstring: str, max_chars: int) -> str:
    """Return the leading paragraphs of `docstring` that fit in `max_chars`; empty if the first does not."""
    kept: list[str] = []
    for paragraph in docstring.strip().split("\n\n"):
        if len("\n\n".join([*kept, paragraph])) > max_chars:
            break
        kept.append(paragraph)
    # A heading or a lead-in whose content was cut off promises what does not follow.
    while kept and kept[-1].rstrip().endswith(":"):
        kept.pop()
    return "\n\n".join(kept).strip()


def _is_usable(answer: str) -> bool:
    # A docstring may hold a lone surrogate, which no UTF-8 file can.
    return len(answer) >= MIN_ANSWER_CHARS and not any("\ud800" <= char <= "\udfff" for char in answer)


def _row(definition: Definition, answer: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": _instruction(definition, answer)},
        {"role": "assistant", "content": answer},
    ]
    return {"id": definition.qualified_name, "messages": messages}


def _instruction(definition: Definition, answer: str) -> str:
    """Ask by qualified name or by bare signature; the content decides, so that copies are asked alike."""
    digest = hashlib.sha256(f"{definition.signature}\n{answer}".encode()).digest()
    is_class = definition.kind == "class"
    if digest[0] % 2:
        keyword = "class" if is_class else "def"
        return f"Write the docstring of this Python {definition.kind}:\n\n{keyword} {definition.signature}:"
    scope = definition.qualified_name.rpartition(".")[0]
    if is_class:
        return f"What is the class `{definition.qualified_name}` for?"
    return f"What does `{scope}.{definition.signature}` do?"
