"""docs/formats.md is true: its examples go through the code, and its tables name what exists."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import CALLING, build, make_tokenizer, write_jsonl
from test_data_tokenize import decoded

from grads_dist.data.config import COLUMNS, DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.detect import resolve_formats
from grads_dist.data.formats import REQUIRED
from grads_dist.data.locate import KINDS

TEXT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    return re.split(r"^#+ ", TEXT.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def examples(title: str, language: str = "json") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)


def table(title: str) -> list[list[str]]:
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model"), CALLING)


def encode(folder: Path, model: Path, title: str, **options: Any) -> list[tuple[str, str]]:
    """Text and loss of the examples under a heading, each of them a corpus; their format is that heading."""
    shown = []
    for k, example in enumerate(examples(title)):
        path = write_jsonl(folder / f"{k}.jsonl", [json.loads(example)])
        config = DataConfig(str(path), cache_dir=str(folder / "cache"), **options)
        if title in REQUIRED:
            assert resolve_formats(config, Corpus.open(config)) == [title]
        shown += decoded(build(folder, path, model, **options), model)
    return shown


def test_every_format_has_an_example_and_conversations_are_the_same(tmp_path: Path, model: Path) -> None:
    chats = [encode(tmp_path, model, title) for title in ("messages", "sharegpt", "alpaca")]
    assert chats[0] == chats[1] == chats[2]
    assert [loss for _, loss in chats[0]] == ["Two.<|im_end|>Four.<|im_end|>"]
    assert "And this?\n2 + 2<|im_end|>" in chats[0][0][0]
    text, messages = encode(tmp_path, model, "prompt_completion")
    assert text == ("Two plus two? Four.</s>", "Four.</s>") and messages[1] == "Four.<|im_end|>"
    assert encode(tmp_path, model, "text")[0][0] == "Two plus two is four.</s>"
    assert len(encode(tmp_path, model, "tokens")) == 1
    assert all(examples(title) for title in REQUIRED)


def test_examples_of_calls_are_the_same(tmp_path: Path, model: Path) -> None:
    first, second = encode(tmp_path, model, "Tool calls")
    assert first == second and '<|im_start|>tools\n[{"type": "function"' in first[0]
    assert first[1] == 'weather({"city": "Rome"})<|im_end|>No.<|im_end|>'


def test_example_of_own_names(tmp_path: Path, model: Path) -> None:
    options = yaml.safe_load(examples("Your own names", "yaml")[0])["data"]
    del options["path"]
    text, loss = encode(tmp_path, model, "Your own names", **options)[0]
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>") and loss == "Yes.<|im_end|>"


def test_kinds_of_files_are_those_of_the_table() -> None:
    assert [row[0].strip("`") for row in table("Files")[:-1]] == list(KINDS)


def test_options_are_those_that_exist() -> None:
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    rows = [*table("Which turns carry loss"), *table("Options of other tools")]
    named = [name for row in rows for name in re.findall(r"`data\.(\w+)`", row[0])]
    assert set(named) <= fields and len(named) == len(rows)
    columns = [re.findall(r"`(\w+)`", row[0]) for row in rows if row[0].startswith("`data.columns`")]
    assert {name for names in columns for name in names} <= set(COLUMNS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_and_defaults_of_trl_are_trls() -> None:
    trl = pytest.importorskip("trl")
    script = {field.name for field in dataclasses.fields(trl.ScriptArguments)}
    known = {field.name: field.default for field in dataclasses.fields(trl.SFTConfig)}
    named = [name for row in table("Options of other tools") for name in re.findall(r"`(\w+)`", row[1])]
    assert set(named) <= script | set(known) and len(named) > 8
    assert known["assistant_only_loss"] is False and known["completion_only_loss"] is None
