"""Tiny tokenizers, chat templates and corpora for the tests of the data stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.store import TokenStore
from grads_dist.data.tokenize import TokenizerSource, tokenize

SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LINES = ["the quick brown fox jumps over the lazy dog", "what is two plus two? four.", "hello hello world"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows tools and calls.
CALLING = (
    "{% macro said(m) %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|im_end|>{% endmacro %}"
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ said(m) }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLING_MARKED = CALLING.replace(
    "{{ said(m) }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ said(m) }}{% endgeneration %}{% else %}{{ said(m) }}"
    "{% endif %}",
)
# Turns in the style of Llama 2: no header to prompt with, the content trimmed, the turn ends with </s>.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
# A header that add_generation_prompt does not give.
NO_PROMPT = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
REVERSED = CHATML.replace("in messages", "in messages | reverse")
SHOUTING = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def make_tokenizer(folder: Path, template: str | None = CHATML, bos: bool = False) -> Path:
    """Save a byte-level BPE tokenizer, which adds <s> in front if `bos` is set, and return its folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    if bos:
        # Like Llama 3: offsets leave out the space before a word, and <s> comes first.
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def make_spaced_tokenizer(folder: Path) -> Path:
    """Save a tokenizer that puts a space before every text, like that of Llama 2, and return its folder."""
    words = ["<unk>", "</s>", "▁", "▁hello", "▁world", "world"]
    backend = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any] | str]) -> Path:
    """Write rows, of which a str is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def chat(*turns: str) -> dict[str, Any]:
    """A row of alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns)]}


def build(
    folder: Path, path: Path | str | list[str], model: Path, vocab_size: int | None = None, **options: Any
) -> TokenStore:
    """Tokenize in this process unless told otherwise, with a cache under `folder`."""
    path = path if isinstance(path, list) else str(path)
    config = DataConfig(path, **{"cache_dir": str(folder / "cache"), "num_workers": 1, **options})
    return tokenize(config, Corpus.open(config), TokenizerSource(str(model)), vocab_size)


def loss_runs(tokenizer: Any, ids: np.ndarray, loss: np.ndarray) -> list[str]:
    """The decoded runs of tokens that carry loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loss, [False]]).astype(int)))
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]
