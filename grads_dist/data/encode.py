"""One row to tokens and the tokens that carry loss, by the format of the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from grads_dist.data.chat import ChatEncoder
from grads_dist.data.config import DataConfig
from grads_dist.data.example import Chat, Completion, Example, Text, Tokens
from grads_dist.data.formats import CHATS, RowFormat, read_example
from grads_dist.data.rows import RowError
from grads_dist.data.spans import tokenize_spans
from grads_dist.data.tokenizer import TokenizerSource, find_template, load_tokenizer, special_ids
from grads_dist.errors import ConfigError

_NO_TEMPLATE = (
    "data.chat_template: the rows are chats and the tokenizer has no chat template; give a Jinja file"
)


@dataclass(frozen=True)
class Encoding:
    """How rows are encoded; equal encodings of equal rows give equal tokens."""

    config: DataConfig
    formats: tuple[RowFormat, ...]
    """Of each file of the corpus."""
    source: TokenizerSource
    vocab_size: int | None = None

    @property
    def kinds(self) -> str:
        """The formats in words."""
        return " and ".join(dict.fromkeys(self.formats))


@dataclass(frozen=True)
class EncodedRow:
    """Token ids int32[T] and bool[T], the tokens that carry loss; T and the sum are at least 2 and 1."""

    tokens: np.ndarray
    loss: np.ndarray
    is_truncated: bool
    token_hash: int
    """Of the whole row, before it was cut at max_length."""


def token_hash(ids: np.ndarray, loss: np.ndarray) -> int:
    """The first 8 bytes of blake2b over little-endian int32 `ids`, then `loss` as bytes; signed."""
    content = ids.astype("<i4").tobytes() + loss.astype(np.uint8).tobytes()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


class RowEncoder:
    """Encodes rows one by one; holds the tokenizer (None for rows of token ids)."""

    def __init__(self, encoding: Encoding) -> None:
        self._config = encoding.config
        self._formats = list(dict.fromkeys(encoding.formats))
        self._vocab_size = encoding.vocab_size
        self.tokenizer: Any = None
        self.template: str | None = None
        self._chat: ChatEncoder | None = None
        self._head: list[int] = []
        self._tail: list[int] = []
        self._special = np.zeros(0, dtype=np.int64)
        if self._formats == ["tokens"]:
            return
        self.tokenizer = load_tokenizer(encoding.source)
        self._head, self._tail = _text_frame(self.tokenizer)
        self._special = np.array(sorted(special_ids(self.tokenizer)), dtype=np.int64)
        if any(name in (*CHATS, "prompt_completion") for name in self._formats):
            self.template = find_template(self.tokenizer, self._config.chat_template)
        if self.template is not None:
            self._chat = ChatEncoder(self.tokenizer, self.template)
        elif any(name in CHATS for name in self._formats):
            raise ConfigError(_NO_TEMPLATE)

    @property
    def mask(self) -> str:
        """How the tokens that carry loss are found, in one phrase."""
        return ", ".join(dict.fromkeys(map(self._mask, self._formats)))

    def _mask(self, row_format: RowFormat) -> str:
        if row_format == "tokens":
            return "labels"
        if row_format in CHATS and self._config.assistant_only_loss and self._chat is not None:
            marks = {"generation": "{% generation %} marks", "prefix": "growing prefixes"}
            return f"assistant turns by {marks[self._chat.method]}"
        if row_format == "prompt_completion" and self._completion_only:
            return "completion"
        return "all tokens"

    @property
    def _completion_only(self) -> bool:
        return self._config.completion_only_loss is not False

    def encode(self, row: dict[str, Any], row_format: RowFormat) -> EncodedRow:
        """Encode `row`, which is of this format. Raises RowError when it cannot be used."""
        ids, loss = self._encode(read_example(row, self._config, row_format))
        return self._finish(ids, loss)

    def _encode(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(example, Tokens):
            return example.input_ids, example.loss
        if isinstance(example, Text):
            return self._frame(example.text, 0)
        if isinstance(example, Completion):
            text = example.prompt + example.completion
            return self._frame(text, len(example.prompt) if self._completion_only else 0)
        assert isinstance(example, Chat)
        if self._chat is None:
            raise ConfigError(_NO_TEMPLATE)
        return self._chat.encode(example, self._config.assistant_only_loss, self._completion_only)

    def _frame(self, text: str, start: int) -> tuple[np.ndarray, np.ndarray]:
        """`text` between a document's special tokens; characters from `start` on and the end carry loss."""
        spans = tokenize_spans(self.tokenizer, text, [start])
        # A token across the start says a part of what is to be learned.
        loss = spans.within(start, len(text) + 1, self._special)
        head = [] if len(spans.ids) and spans.ids[:1].tolist() == self._head else self._head
        tail = [] if len(spans.ids) and spans.ids[-1:].tolist() == self._tail else self._tail
        ids = np.concatenate([np.array(head, dtype=np.int64), spans.ids, np.array(tail, dtype=np.int64)])
        return ids, np.concatenate([np.zeros(len(head), dtype=bool), loss, np.ones(len(tail), dtype=bool)])

    def _finish(self, ids: np.ndarray, loss: np.ndarray) -> EncodedRow:
        """Check the ids, cut at max_length and make sure that there is something to predict."""
        length, limit = len(ids), self._config.max_length
        if length < 2:
            raise RowError("too short", f"{length} token{'s' * (length != 1)}: nothing to predict")
        outside = ids < 0 if self._vocab_size is None else (ids < 0) | (ids >= self._vocab_size)
        if outside.any():
            k = int(np.flatnonzero(outside)[0])
            size = "" if self._vocab_size is None else f" of {self._vocab_size}"
            raise RowError("token id", f"token id {ids[k]} at position {k} is outside the vocabulary{size}")
        loss = loss.copy()
        loss[0] = False
        whole_hash = token_hash(ids, loss)
        loss = loss[:limit]
        if not loss.any():
            cut = f" within max_length {limit} (the row has {length} tokens)" if length > limit else ""
            raise RowError("no loss", f"no token carries loss{cut}")
        return EncodedRow(ids[:limit].astype(np.int32), loss, length > limit, whole_hash)


def _text_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text: those before only if the tokenizer adds them itself."""
    added = tokenizer("", add_special_tokens=True)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return ([bos] if bos is not None and bos in added else []), ([eos] if eos is not None else [])
