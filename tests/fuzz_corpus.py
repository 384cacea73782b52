"""Hostile corpora: what lines, arrays, CSV files and tables are made of, and what must hold of each.

Every row of a corpus ends in the token store or among the rejected, once, with a reason of one printable
line; all that may be raised is a GradsDistError of one line. A subset has the bytes of its rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from data_helpers import CALLING, CALLING_MARKED, CHATML, GENERATION, INSTRUCT, NO_SYSTEM, make_tokenizer
from hypothesis import strategies as st

from grads_dist.data import encode
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.store import TokenStore
from grads_dist.data.tokenize import TokenizerSource, tokenize
from grads_dist.data.tokenizer import load_tokenizer
from grads_dist.errors import GradsDistError

TEMPLATES = (CHATML, GENERATION, CALLING, CALLING_MARKED, INSTRUCT, NO_SYSTEM)
VOCAB = 320
LONGEST_FAULT = 1000
"""Characters of an error; what it quotes of a corpus is cut short."""

_SPACE = b" \t\n\r\v\f"

# ---- values

_ODD_TEXT = st.sampled_from(
    [
        "", " ", "\ud800", "\udfff a", "a\x00b", "\x1b[31mred\x1b[0m", "\u2028", "\u202e", "\ufeff",
        "<|im_end|>", "</s>", "<s>", "{{ 7 * 7 }}", "{% generation %}", "[", '{"a": 1', "\r\n", "x" * 3000,
        "e\u0301", "𝒳",
    ]
)  # fmt: skip
TEXTS = st.text(max_size=12) | _ODD_TEXT
_NUMBERS = st.one_of(
    st.integers(-3, 400),
    st.integers(),
    st.sampled_from([2**31, -(2**31) - 1, 2**63, 2**64, 10**400]),
    st.floats(),
    st.booleans(),
)
_LEAVES = st.none() | _NUMBERS | TEXTS
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)

# ---- rows

_CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.just("f") | VALUES, "arguments": VALUES})},
    optional={"type": VALUES, "id": VALUES},
)
_ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
_MESSAGE = st.fixed_dictionaries(
    {"role": _ROLES, "content": TEXTS},
    optional={"tool_calls": st.lists(_CALL, max_size=2) | VALUES, "weight": VALUES, "name": VALUES},
)
_PLAIN = st.builds(
    lambda asked, said: [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
    TEXTS,
    TEXTS,
)
_TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "function_call", "observation", "narrator"]), "value": TEXTS}
)
_IDS = st.lists(st.integers(0, VOCAB + 2), max_size=6) | st.lists(_NUMBERS, max_size=4)
ROWS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "messages": st.fixed_dictionaries(
        {"messages": _PLAIN | st.lists(_MESSAGE, max_size=4)}, optional={"id": VALUES, "tools": VALUES}
    ),
    "sharegpt": st.fixed_dictionaries(
        {"conversations": st.lists(_TURN, max_size=4)}, optional={"system": VALUES, "tools": VALUES}
    ),
    "alpaca": st.fixed_dictionaries(
        {"instruction": TEXTS, "output": TEXTS}, optional={"input": VALUES, "history": VALUES}
    ),
    "prompt_completion": st.fixed_dictionaries({"prompt": TEXTS | _PLAIN, "completion": TEXTS | _PLAIN}),
    "text": st.fixed_dictionaries({"text": TEXTS}, optional={"id": VALUES}),
    "tokens": st.fixed_dictionaries({"input_ids": _IDS}, optional={"labels": _IDS, "attention_mask": _IDS}),
}
SOUND: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "bc"}]},
    "alpaca": {"instruction": "a", "output": "bc"},
    "prompt_completion": {"prompt": "a ", "completion": "bc"},
    "text": {"text": "abc"},
    "tokens": {"input_ids": [7, 8, 9]},
}
"""A row of each format that can be used under every template."""


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a row."""
    if isinstance(value, dict):
        return [(value, key) for key in value] + [place for v in value.values() for place in _places(v)]
    if isinstance(value, list):
        return [(value, k) for k in range(len(value))] + [place for v in value for place in _places(v)]
    return []


@st.composite
def changed_rows(draw: st.DrawFn, row_format: str) -> dict[str, Any]:
    """A row of the format in which some values are gone, of another type, or wrapped."""
    row: dict[str, Any] = json.loads(json.dumps(draw(ROWS[row_format])))
    for _ in range(draw(st.integers(1, 2))):
        places = _places(row)
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(["remove", "replace", "wrap", "null", "text", "add"]))
        if how == "remove":
            del container[key]
        elif how == "add" and isinstance(container, dict):
            container[draw(TEXTS)] = draw(VALUES)
        else:
            old = container[key]
            new = {"wrap": [old], "null": None, "text": json.dumps(old)}
            container[key] = new[how] if how in new else draw(VALUES)
    return row


def _dump(row: Any, is_ascii: bool) -> bytes:
    return json.dumps(row, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")


@st.composite
def _damaged(draw: st.DrawFn, line: bytes) -> bytes:
    position = draw(st.integers(0, len(line)))
    how = draw(st.sampled_from(["cut", "insert", "double", "flip"]))
    if how == "cut":
        return line[:position]
    if how == "double":
        return line + line
    if how == "flip":
        return line[:position] + bytes([draw(st.integers(0, 255))]) + line[position + 1 :]
    return line[:position] + draw(st.binary(max_size=4)) + line[position:]


_ODD_LINES = st.sampled_from(
    [
        b"", b" \t", b"\r", b"null", b"[]", b"{}", b"NaN", b"-Infinity", b'"text"', b"1e999999",
        b"\xff\xfe", b"\x00", b"\xef\xbb\xbf{}", b"[" * 100_000, b"{\"a\":" * 100_000,
        b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", b'{"text": "a", "text": 5}',
        b'{"messages": [], "messages": null}', b'{"text": "a"}\r', b'{"text": "\\ud800"}',
        b'{"text": ' + b"9" * 5000 + b"}", b'{"input_ids": [1e308, NaN]}',
        b'{"text": "' + b"y" * 70_000 + b'"}', b'{"\\u001b[31m": 1}',
        b'{"messages": ' + b'[{"role":"user","content":' * 3000 + b"1}", b"\x0b", b"\x0c{}", b"\x85",
    ]
)  # fmt: skip


@st.composite
def lines(draw: st.DrawFn, row_format: str) -> bytes:
    """One line of a corpus that should be of this format; may hold a line break, and is two then."""
    kind = draw(st.integers(0, 11))
    if kind == 0:
        return draw(_ODD_LINES)
    if kind == 1:
        return draw(st.binary(max_size=30))
    if kind == 2:
        return _dump(draw(VALUES), draw(st.booleans()))
    if kind == 3:
        return _dump(draw(ROWS[draw(st.sampled_from(sorted(ROWS)))]), True)
    row = draw(ROWS[row_format] if kind < 7 else changed_rows(row_format))
    line = _dump(row, draw(st.booleans()))
    return draw(_damaged(line)) if kind > 9 else line


# ---- corpora


@dataclass(frozen=True)
class Case:
    """A corpus and how it is read."""

    rows: list[bytes]
    end: bytes
    is_marked: bool
    template: str
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, most: int = 40) -> Case:
    """A corpus of JSON lines with at least one row that can be used, by whatever means it is read."""
    row_format = draw(st.sampled_from(sorted(ROWS)))
    rows = draw(st.lists(lines(row_format), min_size=most // 2, max_size=most))
    rows.insert(draw(st.integers(0, 3)), _dump(SOUND[row_format], True))
    options: dict[str, Any] = {"max_length": draw(st.sampled_from([2048, 2048, 2048, 40, 2]))}
    # By its columns, what stands among the first rows may make another format of it, or none.
    options["format"] = draw(st.sampled_from([row_format, row_format, row_format, "auto"]))
    options["assistant_only_loss"] = draw(st.booleans())
    if row_format == "prompt_completion":
        options["completion_only_loss"] = draw(st.sampled_from([None, False, True]))
    return Case(
        rows,
        draw(st.sampled_from([b"\n", b"\n", b"\r\n", b""])),
        draw(st.booleans()),
        draw(st.sampled_from(TEMPLATES)),
        options,
    )


def expected_rows(content: bytes) -> list[bytes]:
    """The lines with more than white space, each with its ending; told without the code under test."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    return [line + b"\n" for line in content.split(b"\n") if line.strip(_SPACE)]


@functools.cache
def _tokenizer(folder: str) -> Any:
    return load_tokenizer(TokenizerSource(folder))


@contextmanager
def one_tokenizer(folder: Path):
    """Load the tokenizer once for many corpora."""
    with mock.patch.object(encode, "load_tokenizer", lambda source: _tokenizer(str(folder))):
        yield


def check_jsonl(folder: Path, model: Path, case: Case) -> dict[str, int]:
    """Write the corpus, take it through the data stage and check what must hold; gives counts."""
    end = case.end or b"\n"
    content = (b"\xef\xbb\xbf" if case.is_marked else b"") + end.join(case.rows) + case.end
    path = folder / "corpus.jsonl"
    path.write_bytes(content)
    template = folder / "template.jinja"
    template.write_text(case.template, encoding="utf-8")
    config = DataConfig(
        str(path), cache_dir=str(folder / "cache"), num_workers=1, chat_template=str(template), **case.options
    )
    expected = expected_rows(content)
    corpus = Corpus.open(config)
    assert corpus.num_rows == len(expected)
    kept = check_rows(config, corpus, model)
    for chosen in ([] if kept is None else [kept]) + [np.arange(corpus.num_rows)]:
        written = corpus.write_subset(chosen, folder).read_bytes()
        assert written == b"".join(expected[k] for k in chosen)
    return {
        "rows": corpus.num_rows,
        "kept": 0 if kept is None else len(kept),
        "files refused": int(kept is None),
    }


def check_rows(config: DataConfig, corpus: Corpus, model: Path) -> np.ndarray | None:
    """Tokenize; the rows that are kept, or None where the corpus as a whole is refused."""
    store = refusal(lambda: tokenize(config, corpus, TokenizerSource(str(model)), VOCAB))
    if store is None:
        return None
    assert isinstance(store, TokenStore)
    rejected = list(store.iter_rejected())
    kept = np.array(store.index)
    found = np.sort(np.concatenate([kept, np.array([k for k, _ in rejected], dtype=np.int64)]))
    assert np.array_equal(found, np.arange(corpus.num_rows)), "a row is lost, or there twice"
    assert all(np.diff(kept) > 0) and len(store.ids[:]) == len(kept)
    for _, reason in rejected:
        check_line(reason)
    for k in range(store.num_rows):
        tokens, loss = store.tokens(k), store.loss_mask(k)
        assert 2 <= len(tokens) == len(loss) <= config.max_length and loss.any() and not loss[0]
        assert tokens.min() >= 0 and tokens.max() < VOCAB
    return kept


def refusal(action: Callable[[], Any]) -> Any:
    """What `action` gives, or None where it raises a GradsDistError, whose text has to be a good line."""
    try:
        return action()
    except GradsDistError as error:
        check_line(str(error))
        return None


def check_line(text: str) -> None:
    """One line that a terminal shows and does nothing else with."""
    assert text.strip() and text.isprintable(), ascii(text)
    assert len(text) <= LONGEST_FAULT, f"{len(text)} characters: {text[:200]!r}"


def make_model(folder: Path) -> Path:
    """A tokenizer for all of these."""
    return make_tokenizer(folder)
