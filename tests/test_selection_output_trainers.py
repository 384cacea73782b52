"""What trainers read from the folder of a selection: datasets, TRL, LLaMA-Factory and axolotl themselves."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from output_cases import TEXTS, write
from test_selection_output import FORMS, ROWS, SCORED, make_corpus
from tiny import tiny_model
from workspace import make_tokenizer

from grads_dist.data.config import DataConfig
from grads_dist.data.example import Chat
from grads_dist.data.formats import RowFormat, read_example

datasets = pytest.importorskip("datasets")

CHAT = [("user", "hi"), ("assistant", "yes"), ("user", "and?"), ("assistant", "no")]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def openai(*turns: tuple[str, str], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: who, content: said} for who, said in turns]


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return openai(*((SHAREGPT[who], said) for who, said in turns), role="from", content="value")


SYSTEM = ("system", "Be brief.")
OWN = {"columns": {"conversations": "dialog", "role": "speaker", "content": "said", "system": "setting"}}
OWN_TAGS = OWN | {"roles": {"customer": "user", "agent": "assistant"}}
TAGGED = openai(("customer", "a"), ("agent", "b"), role="speaker", content="said")
RENAMED = {"columns": {"instruction": "ask", "output": "answer", "input": "more"}}

# name: (format, rows, options of data). What a reader makes of them is compared with our own reading.
CASES: dict[str, tuple[RowFormat, list[dict[str, Any]], dict[str, Any]]] = {
    "messages": ("messages", [{"messages": openai(*CHAT)}, {"messages": openai(SYSTEM, *CHAT[:2])}], {}),
    "sharegpt": ("sharegpt", [{"conversations": sharegpt(*CHAT)}] * 2, {}),
    "sharegpt with a system column": (
        "sharegpt",
        [
            {"conversations": sharegpt(*CHAT), "system": "Be brief."},
            {"conversations": sharegpt(*CHAT[:2]), "system": "Be long."},
        ],
        {},
    ),
    "names of one's own": (
        "sharegpt",
        [{"dialog": TAGGED, "setting": "s"}, {"dialog": TAGGED * 2, "setting": "s"}],
        OWN_TAGS,
    ),
    "alpaca": (
        "alpaca",
        [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "input": "", "output": "e"}],
        {},
    ),
    "alpaca with a system column": (
        "alpaca",
        [
            {"instruction": "a", "output": "c", "system": "s"},
            {"instruction": "d", "output": "e", "system": ""},
        ],
        {},
    ),
    "renamed alpaca": (
        "alpaca",
        [{"ask": "a", "more": "b", "answer": "c"}, {"ask": "d", "more": "", "answer": "e"}],
        RENAMED,
    ),
    "prompt and completion": ("prompt_completion", [{"prompt": t, "completion": "z"} for t in "ab"], {}),
    "messages in prompt and completion": (
        "prompt_completion",
        [{"prompt": openai(*CHAT[:1]), "completion": openai(*CHAT[1:2])}] * 2,
        {},
    ),
    "text": ("text", [{"text": "one"}, {"text": "two"}], {}),
    "tokens": ("tokens", [{"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1]}] * 2, {}),
    "tool calls": (
        "messages",
        [
            {
                "messages": [
                    {"role": "user", "content": "Rain?"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {"type": "function", "function": {"name": "rain", "arguments": {"city": "Rome"}}}
                        ],
                    },
                    {"role": "tool", "content": "sun"},
                    {"role": "assistant", "content": "No."},
                ],
                "tools": [{"type": "function", "function": {"name": "rain"}}],
            }
        ]
        * 2,
        {},
    ),
}
NO_LLAMA_FACTORY = {"messages in prompt and completion", "tokens"}
NO_AXOLOTL = {"messages in prompt and completion", "names of one's own"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def write_case(tmp_path: Path, name: str, **output: Any) -> tuple[Path, list[Any]]:
    """The folder of a selection of all rows of a case, and the rows as we read them."""
    row_format, rows, data = CASES[name]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, _ = write(tmp_path, path, list(range(len(rows))), data=data, **output)
    config = DataConfig(path=str(path), **data)
    return folder, [read_example(row, config, row_format) for row in rows]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows_per_file", [None, 2])
@pytest.mark.parametrize("scores", [False, True])
def test_datasets_reads_exactly_the_rows_from_the_folder(tmp_path, form, rows_per_file, scores):
    assert len({row["prompt"] for row in ROWS}) == len(TEXTS)
    selected = list(range(len(ROWS)))[1:]
    folder, _ = write(
        tmp_path, make_corpus(tmp_path, form), selected, scores=scores, rows_per_file=rows_per_file
    )
    dataset = datasets.load_dataset(str(folder))
    assert list(dataset) == ["train"]
    assert dataset["train"].to_list() == [(SCORED if scores else ROWS)[i] for i in selected]


def test_more_shards_than_fit_the_digits_of_one_stay_in_order(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(12)))
    folder, _ = write(tmp_path, path, list(range(12)), rows_per_file=1)
    assert datasets.load_dataset(str(folder), split="train")["text"][:] == [f"t{i}" for i in range(12)]


def python_of(card: str) -> list[str]:
    return [block.partition("```")[0] for block in card.split("```python\n")[1:]]


@pytest.mark.parametrize("name", [name for name in CASES if name != "tokens"])
def test_trl_trains_on_what_the_card_says(tmp_path, name):
    trl = pytest.importorskip("trl")
    folder, expected = write_case(tmp_path, name, scores=True)
    *prepare, train = python_of((folder / "README.md").read_text().replace("FOLDER", str(folder)))
    assert "SFTTrainer(" in train
    values: dict[str, Any] = {}
    for block in prepare:
        exec(block, values)
    tokenizer = make_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).to(torch.float32)
    args = trl.SFTConfig(output_dir=str(tmp_path / "sft"), report_to="none", use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(model, args, train_dataset=values["dataset"], processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(expected)
    for row, example in zip(trainer.train_dataset, expected, strict=True):
        shown = tokenizer.decode(row["input_ids"])
        if isinstance(example, Chat):
            assert shown.rstrip() == tokenizer.apply_chat_template(example.messages, tokenize=False).rstrip()
        else:
            said = [
                getattr(example, part) for part in ("prompt", "completion", "text") if hasattr(example, part)
            ]
            assert shown.removesuffix(tokenizer.eos_token) == "".join(said)


def load_or_skip(*names: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        pytest.skip(f"{names[0].partition('.')[0]} is not installed ({error})")


@pytest.mark.parametrize("rows_per_file", [None, 1])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_LLAMA_FACTORY])
def test_llama_factory_reads_the_stanza(tmp_path, name, rows_per_file):
    loader, parser = load_or_skip("llamafactory.data.loader", "llamafactory.data.parser")
    folder, expected = write_case(tmp_path, name, rows_per_file=rows_per_file)
    options = SimpleNamespace(
        dataset_dir=str(folder), streaming=False, max_samples=None, preprocessing_num_workers=None
    )
    options.overwrite_cache, options.media_dir = True, str(folder)
    model = SimpleNamespace(cache_dir=str(tmp_path / "hf"), hf_hub_token=None)
    training = SimpleNamespace(local_process_index=0)
    [attributes] = parser.get_dataset_list(["grads_mine"], str(folder))
    found = loader._load_single_dataset(attributes, model, options, training)
    assert sorted(map(llama_factory_turns, found), key=str) == sorted(map(our_turns, expected), key=str)


def llama_factory_turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """As LLaMA-Factory aligns it; its converter for OpenAI's format writes into the system prompt."""
    turns = [(turn["role"], turn["content"]) for turn in [*row["_prompt"], *row["_response"]]]
    system = (row["_system"] or "").replace("detailed thinking off", "").strip()
    return [("system", system), *turns] if system else turns


def our_turns(example: Any) -> list[tuple[str, str]]:
    if not isinstance(example, Chat):
        if hasattr(example, "text"):
            return [("user", example.text)]
        return [("user", example.prompt), ("assistant", example.completion)]
    turns = []
    for message in example.messages:
        calls = message.get("tool_calls")
        said = json.dumps([call["function"] for call in calls]) if calls else message["content"]
        role = "function" if calls else {"tool": "observation"}.get(message["role"], message["role"])
        turns.append((role, said))
    return turns


@pytest.mark.parametrize("rows_per_file", [None, 1])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_AXOLOTL])
def test_axolotl_reads_the_stanza(tmp_path, name, rows_per_file, monkeypatch):
    shared, wrappers, schemas, dicts = load_or_skip(
        "axolotl.utils.data.shared",
        "axolotl.utils.data.wrappers",
        "axolotl.utils.schemas.datasets",
        "axolotl.utils.dict",
    )
    folder, expected = write_case(tmp_path, name, rows_per_file=rows_per_file)
    monkeypatch.chdir(folder)
    [stanza] = yaml.safe_load((folder / "axolotl.yaml").read_text())["datasets"]
    checked = schemas.SFTDataset(**stanza).model_dump(exclude_none=True)
    options = dicts.DictDefault(checked)
    dataset = shared.load_dataset_with_config(options, use_auth_token=False)
    assert len(dataset) == len(expected)
    tokenizer = make_tokenizer()
    config = dicts.DictDefault({"sequence_len": 512, "train_on_inputs": False, "dataset_num_proc": 1})
    base = options.type if isinstance(options.type, str) else None
    found, _ = wrappers.get_dataset_wrapper(options, tokenizer, config, base, dataset)
    assert len(found) == len(expected)
    for row, example in zip(found, expected, strict=True):
        shown = tokenizer.decode(row["input_ids"])
        if isinstance(example, Chat) and CASES[name][0] in ("messages", "sharegpt"):
            assert shown.rstrip() == tokenizer.apply_chat_template(example.messages, tokenize=False).rstrip()
        elif name != "tokens":
            assert all(word in shown for _, said in our_turns(example) for word in said.split())


@pytest.mark.parametrize("name", sorted({*NO_LLAMA_FACTORY, *NO_AXOLOTL}))
def test_rows_that_a_trainer_cannot_read_get_no_stanza_and_a_reason(tmp_path, name):
    folder, _ = write_case(tmp_path, name)
    card = (folder / "README.md").read_text()
    for trainer, file, names in (
        ("LLaMA-Factory", "dataset_info.json", NO_LLAMA_FACTORY),
        ("axolotl", "axolotl.yaml", NO_AXOLOTL),
    ):
        assert (folder / file).exists() == (name not in names)
        assert (f"so there is no {file}." in card) == (name in names), trainer
