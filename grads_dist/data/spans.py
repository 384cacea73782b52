"""Tokens with the characters they stand for: loss given by characters becomes loss given by tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from grads_dist.data.rows import RowError


@dataclass(frozen=True)
class Spans:
    """Token ids int64[T]; token t stands for the characters starts[t] to ends[t] (int64[T] each)."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def within(self, start: int, end: int, special: np.ndarray) -> np.ndarray:
        """bool[T]: the tokens that share a character with start..end, or stand empty inside it.

        special: ids of the tokens that have to begin there. They may swallow the white space that follows
        them, as the header of an answer does with what the answer begins with, but none of it is theirs.
        """
        overlaps = (self.starts < end) & (self.ends > start)
        inside = overlaps | ((self.starts == self.ends) & (self.starts >= start) & (self.starts < end))
        # Few tokens begin before, mostly none, and np.isin takes longer than all of the above.
        early = np.flatnonzero(inside & (self.starts < start))
        if len(early):
            inside[early[np.isin(self.ids[early], special)]] = False
        return inside


def tokenize_spans(tokenizer: Any, text: str, cuts: Iterable[int]) -> Spans:
    """Tokenize `text` as a whole, adding no special tokens, and apart at the cuts (character positions).

    Apart only where a token would cross a cut, as it is when a model is prompted up to there, and if that
    leaves the text as it is: a tokenizer that puts a space before every text would add one at the cut, and a
    token across it is kept. Raises RowError for text that is not valid Unicode.
    """
    whole = _tokenize(tokenizer, text)
    crossed = [cut for cut in sorted(set(cuts)) if np.any((whole.starts < cut) & (cut < whole.ends))]
    if not crossed:
        return whole
    edges = [0, *crossed, len(text)]
    pieces = [
        _tokenize(tokenizer, text[start:end], start) for start, end in zip(edges, edges[1:], strict=False)
    ]
    apart = Spans(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.starts for piece in pieces]),
        np.concatenate([piece.ends for piece in pieces]),
    )
    return apart if _decode(tokenizer, apart) == _decode(tokenizer, whole) else whole


def _decode(tokenizer: Any, spans: Spans) -> str:
    ids = spans.ids.tolist()
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _tokenize(tokenizer: Any, text: str, shift: int = 0) -> Spans:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("not Unicode", f"half a surrogate pair ({text[error.start]!r}) in the text") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(offsets[:, 1]) if len(ids) else offsets[:, 1]
    # Some tokenizers leave the space before a word out of its offsets: tokens reach back to the one before.
    starts = np.minimum(offsets[:, 0], np.append(0, ends)[: len(ids)])
    return Spans(ids, starts + shift, ends + shift)
