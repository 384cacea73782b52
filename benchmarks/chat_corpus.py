"""A synthetic chat corpus of any size, and a tokenizer for it.

Texts are stretches of one long text of made-up words with Zipf's frequencies; their lengths are log-normal.
Depends on the seed alone. Written in blocks, so that it may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

QUESTION_WORDS, ANSWER_WORDS = 12, 30
"""Medians; the standard deviation of their logarithm is 0.6."""
NUM_WORDS, TEXT_WORDS, MOST_WORDS = 20_000, 1_000_000, 1000
VOCAB_SIZE = 8000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BLOCK_ROWS = 50_000
_SCHEMA = pa.schema(
    {"id": pa.string(), "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))}
)


def make_tokenizer(folder: Path, seed: int = 0) -> Path:
    """Save a byte-level BPE tokenizer of the corpus's words with a chat template that marks its answers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words, text = _words(np.random.default_rng([seed, 0]))
    backend.train_from_iterator([" ".join(words[k] for k in text[:100_000])], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(folder: Path, num_rows: int, num_files: int, seed: int = 0) -> Path:
    """Write the corpus as files of JSON lines of about equal numbers of rows."""
    folder.mkdir(parents=True)
    edges = [num_rows * k // num_files for k in range(num_files + 1)]
    rows = chat_rows(num_rows, seed)
    for k in range(num_files):
        with (folder / f"{k:06d}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(edges[k], edges[k + 1]):
                file.write(json.dumps(next(rows)) + "\n")
    return folder


def write_parquet(folder: Path, num_rows: int, seed: int = 0) -> Path:
    """Write the corpus as one Parquet file."""
    folder.mkdir(parents=True)
    rows = chat_rows(num_rows, seed)
    with pq.ParquetWriter(folder / "corpus.parquet", _SCHEMA) as writer:
        for start in range(0, num_rows, _BLOCK_ROWS):
            block = [next(rows) for _ in range(min(_BLOCK_ROWS, num_rows - start))]
            writer.write_table(pa.Table.from_pylist(block, _SCHEMA))
    return folder


def chat_rows(num_rows: int, seed: int) -> Iterator[dict]:
    """The rows, one after the other."""
    words, sequence = _words(np.random.default_rng([seed, 0]))
    pieces = [words[k] for k in sequence]
    ends = np.cumsum([len(piece) + 1 for piece in pieces])
    text = " ".join(pieces) + " "
    rng = np.random.default_rng([seed, 1])
    for start in range(0, num_rows, _BLOCK_ROWS):
        count = min(_BLOCK_ROWS, num_rows - start)
        lengths = rng.lognormal(np.log([QUESTION_WORDS, ANSWER_WORDS]), 0.6, (count, 2))
        lengths = np.clip(lengths.astype(np.int64), 1, MOST_WORDS)
        first = rng.integers(0, TEXT_WORDS - MOST_WORDS - 1, (count, 2))
        begin, end = ends[first].tolist(), (ends[first + lengths] - 1).tolist()
        for i in range(count):
            question, answer = (text[begin[i][k] : end[i][k]] for k in (0, 1))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield {"id": f"row{start + i}", "messages": messages}


def _words(rng: np.random.Generator) -> tuple[list[str], list[int]]:
    """The words, and which of them make up the long text."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    shares = 1 / np.arange(1, len(letters) + 1) ** 0.7
    sizes = rng.integers(2, 10, NUM_WORDS)
    drawn = rng.choice(letters, int(sizes.sum()), p=shares / shares.sum())
    words = ["".join(word) for word in np.split(drawn, np.cumsum(sizes)[:-1])]
    frequencies = 1 / np.arange(1, NUM_WORDS + 1)
    return words, rng.choice(NUM_WORDS, TEXT_WORDS, p=frequencies / frequencies.sum()).tolist()
