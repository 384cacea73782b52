"""What `inspect` shows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_helpers import chat, make_tokenizer, write_jsonl

from grads_dist.data.config import DataConfig
from grads_dist.data.inspect import inspect
from grads_dist.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tokenizer(tmp_path_factory.mktemp("model"))
    settings = {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 48}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def show(folder: Path, rows: list[Any], model: Path | None, count: int, **options: Any) -> str:
    data = DataConfig(str(write_jsonl(folder / "a.jsonl", rows)), cache_dir=str(folder / "cache"), **options)
    name = None if model is None else str(model)
    return inspect(
        SimpleNamespace(
            data=data, model=SimpleNamespace(name_or_path=name, revision=None, trust_remote_code=False)
        ),
        count,
    )  # type: ignore[arg-type]


def test_samples_mark_the_tokens_that_carry_loss(tmp_path: Path, model: Path) -> None:
    rows = [{**chat("hello", "the\x1b fox"), "id": "first"}, chat("a"), "{", chat("a", "b"), chat("c", "d")]
    text = show(tmp_path, rows, model, 2)
    assert text.startswith("5 rows of messages; loss on assistant turns by growing prefixes, marked ⟦so⟧\n\n")
    assert "--- row 0, id 'first': " in text and "--- row 3, id '3': " in text and "row 4" not in text
    assert "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n⟦the\\x1b fox<|im_end|>⟧\n" in text
    assert "--- 2 of the first 4 rows cannot be used: 1 no loss, 1 broken row\n" in text
    assert "row 1: no token carries loss\nrow 2: broken JSON" in text


def test_rows_are_cut_and_refused_as_the_model_needs_it(tmp_path: Path, model: Path) -> None:
    text = show(tmp_path, [chat("a", "hello " * 5000)], model, 1)
    assert "--- row 0, id '0': 48 tokens" in text and "carry loss, cut at max_length" in text
    text = show(tmp_path, [{"input_ids": [1, 320]}], model, 1)
    assert "row 0: token id 320 at position 1 is outside the vocabulary of 320" in text


def test_inspect_without_the_configuration_of_the_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.name_or_path"):
        show(tmp_path, [chat("a", "b")], make_tokenizer(tmp_path / "tokenizer"), 1)


def test_long_rows_are_cut_in_the_picture(tmp_path: Path, model: Path) -> None:
    text = show(tmp_path, [{"input_ids": [4] * 9000}], None, 1, max_length=100_000)
    assert len(text) < 5000 and "(the rest is not shown)" in text


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_rows_of_tokens_are_decoded_if_there_is_a_tokenizer(
    tmp_path: Path, model: Path, with_tokenizer: bool
) -> None:
    rows = [{"input_ids": [3, 4, 2], "labels": [-100, 4, -100]}]
    text = show(tmp_path, rows, model if with_tokenizer else None, 1)
    assert ("<|im_start|>⟦<|im_end|>⟧</s>" if with_tokenizer else "3⟦4⟧2") in text
