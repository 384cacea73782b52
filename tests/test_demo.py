"""The demo's parts: the harvested corpus, its tokenizer, the pretrained model, the run's configuration."""

import ast
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from grads_dist.config import load_config, save_config
from grads_dist.demo.assets import Assets, Stopwatch, build_assets
from grads_dist.demo.docstrings import Definition, package_root, read_definitions, read_file
from grads_dist.demo.harvest import build_rows, shorten, split_rows, write_rows
from grads_dist.demo.main import demo, demo_config, run_command
from grads_dist.demo.pretrain import PretrainResult, model_config, pretrain
from grads_dist.demo.size import TINY, DemoSize
from grads_dist.demo.tokenizer import train_tokenizer
from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import RunDir

SOURCE = '''
"""Module docstring: not a definition."""
import sys

def plain(a: int, *rest, flag: bool = False, **more) -> str:
    """Say what was given.

    Twice.
    """
    def inner():
        """Not reachable from outside."""

def undocumented(): pass
def _private():
    """Private."""

if sys.version_info > (3, 0):
    async def conditional():
        """Only on new versions."""

class Shape(object):
    """A shape."""
    def area(self):
        """Return the area."""

class Bare:
    """Nothing to inherit."""

class _Hidden:
    """Private."""
    def seen(self):
        """Private with its class."""
'''


@pytest.fixture(scope="module")
def harvested() -> tuple[list[dict], list[dict]]:
    size = DemoSize()
    return split_rows(
        build_rows(read_definitions(size.packages, size.max_files), size.max_answer_chars), size.num_rows
    )


@pytest.fixture(scope="module")
def small_rows() -> list[dict]:
    return build_rows(read_definitions(("json", "logging", "asyncio"), 40), 400)


@pytest.fixture(scope="module")
def tokenizer(small_rows: list[dict]):
    return train_tokenizer(small_rows, vocab_size=512, max_length=384)


def chat(question: str, answer: str, name: str = "x") -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages}


def test_file_yields_its_documented_public_definitions(tmp_path: Path) -> None:
    path = tmp_path / "shapes.py"
    path.write_text(SOURCE)
    assert read_file(path, "geo.shapes") == [
        Definition(
            "geo.shapes.plain",
            "plain(a, *rest, flag=False, **more)",
            "function",
            "Say what was given.\n\nTwice.",
        ),
        Definition("geo.shapes.conditional", "conditional()", "function", "Only on new versions."),
        Definition("geo.shapes.Shape", "Shape(object)", "class", "A shape."),
        Definition("geo.shapes.Shape.area", "area(self)", "function", "Return the area."),
        Definition("geo.shapes.Bare", "Bare", "class", "Nothing to inherit."),
    ]


def test_long_signature_is_abbreviated(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(f"def f({', '.join(f'argument_{i}' for i in range(40))}):\n    'Doc.'\n")
    assert read_file(path, "m")[0].signature == "f(...)"


@pytest.mark.parametrize("source", [b"def broken(:\n", b"x = '\xff'\n", b"\0"])
def test_file_that_is_not_python_is_left_out(tmp_path: Path, source: bytes) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(source)
    assert read_file(path, "broken") == []


def test_packages_are_read_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "demo_dummy_package"
    for name in ("__init__.py", "sub/part.py", "tests/test_it.py", "_private.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("def f():\n    'Do it.'\nraise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = read_definitions(("demo_dummy_package", "no_such_package_here"), 10)
    assert [d.qualified_name for d in found] == ["demo_dummy_package.f", "demo_dummy_package.sub.part.f"]
    assert "demo_dummy_package" not in sys.modules


def test_max_files_bounds_what_is_read() -> None:
    modules = {d.qualified_name.split(".")[1] for d in read_definitions(("asyncio",), 3)}
    assert 1 <= len(modules) <= 3
    assert package_root("asyncio") == Path(ast.__file__).parent / "asyncio"


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("One.", "One."),
        ("One.\n\nTwo.", "One.\n\nTwo."),
        ("One.\n\n" + "x" * 40, "One."),
        ("One.\n\nExample:\n\n" + "x" * 40, "One."),
        ("x" * 41, ""),
        ("Lead-in:", ""),
    ],
)
def test_answer_is_the_leading_paragraphs(docstring: str, answer: str) -> None:
    assert shorten(docstring, 40) == answer


def test_rows_are_chat_and_copies_are_asked_alike() -> None:
    copies = [
        Definition(f"a.m{i}.rotate", "rotate(q, k)", "function", "Rotate the queries.") for i in range(8)
    ]
    rows = build_rows(copies, 400)
    assert [row["id"] for row in rows] == [f"a.m{i}.rotate" for i in range(8)]
    questions = {row["messages"][0]["content"] for row in rows}
    asked_by_name = {f"What does `a.m{i}.rotate(q, k)` do?" for i in range(8)}
    assert questions in (
        asked_by_name,
        {"Write the docstring of this Python function:\n\ndef rotate(q, k):"},
    )
    assert all(row["messages"][1] == {"role": "assistant", "content": "Rotate the queries."} for row in rows)


@pytest.mark.parametrize("docstring", ["Too short.", "A lone surrogate \udc80 cannot be written."])
def test_unusable_answer_makes_no_row(docstring: str) -> None:
    assert build_rows([Definition("m.f", "f()", "function", docstring)], 400) == []


def test_split_keeps_order_and_every_row(small_rows: list[dict]) -> None:
    corpus, rest = split_rows(small_rows, 100)
    assert len(corpus) == 100
    positions = {id(row): i for i, row in enumerate(small_rows)}
    for part in (corpus, rest):
        assert [positions[id(row)] for row in part] == sorted(positions[id(row)] for row in part)
    assert sorted(positions[id(row)] for row in [*corpus, *rest]) == list(range(len(small_rows)))


def test_split_refuses_too_few_rows(small_rows: list[dict]) -> None:
    with pytest.raises(DataError, match=f"only {len(small_rows)} were found"):
        split_rows(small_rows, len(small_rows))


def test_demo_corpus_is_large_and_holds_natural_duplicates(harvested: tuple[list[dict], list[dict]]) -> None:
    corpus, rest = harvested
    assert len(corpus) >= 5000
    assert len(rest) >= 3000
    texts = Counter(json.dumps(row["messages"]) for row in corpus)
    assert 20 <= len(corpus) - len(texts) <= len(corpus) // 5
    packages = Counter(row["id"].split(".")[0] for row in corpus)
    assert {"torch", "transformers", "numpy", "asyncio"} <= set(packages)
    lengths = [len(row["messages"][1]["content"]) for row in corpus]
    assert min(lengths) >= 12 and max(lengths) <= DemoSize().max_answer_chars


def test_harvest_is_deterministic(tmp_path: Path, small_rows: list[dict]) -> None:
    again = build_rows(read_definitions(("json", "logging", "asyncio"), 40), 400)
    for name, rows in (("a", small_rows), ("b", again)):
        write_rows(split_rows(rows, 100)[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text().splitlines()[0]).keys() == {"id", "messages"}


@pytest.mark.parametrize("text", ["Grüße, 世界 🎉", "tab\tand\0nul", " leading  and   inner spaces\n\n"])
def test_tokenizer_gives_any_text_back(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_template_marks_answer_and_end_of_turn(tokenizer) -> None:
    messages = [*chat("First?", "One.")["messages"], *chat("Second?", "Two.")["messages"]]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "One.<|im_end|>Two.<|im_end|>"
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<|im_start|>user\nFirst?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\nSecond?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_tokenizer_has_what_training_needs(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 512
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.model_max_length == 384
    assert loaded.chat_template == tokenizer.chat_template


def test_pretraining_teaches_and_repeats_itself(small_rows: list[dict], tokenizer) -> None:
    size = dataclasses.replace(TINY, pretrain_steps=30)
    model, result = pretrain(small_rows, tokenizer, size)
    assert result.num_tokens == 30 * size.pretrain_batch * size.sequence_length
    assert result.num_parameters == sum(p.numel() for p in model.parameters())
    assert result.first_loss == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.3)
    assert result.last_loss < result.first_loss - 0.7
    assert not model.config.tie_word_embeddings
    state = torch.random.get_rng_state()
    _, again = pretrain(small_rows, tokenizer, size)
    assert again.last_loss == pytest.approx(result.last_loss, rel=1e-4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_demo_model_is_of_the_promised_size() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            model_config(vocab_size=DemoSize().vocab_size, eos=1, pad=0, size=DemoSize())
        )
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 10_000_000


def test_assets_are_a_corpus_and_a_model_that_loads(tmp_path: Path) -> None:
    size = dataclasses.replace(TINY, num_rows=30, pretrain_steps=1, packages=("json", "logging"))
    watch = Stopwatch()
    assets = build_assets(tmp_path / "assets", size, watch)
    rows = [json.loads(line) for line in assets.corpus.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 30 < assets.num_definitions
    model = AutoModelForCausalLM.from_pretrained(assets.model)
    vocabulary = len(AutoTokenizer.from_pretrained(assets.model))
    assert model.get_output_embeddings().weight.shape == (vocabulary, size.hidden_size)
    assert list(watch.seconds) == ["reading docstrings", "training the tokenizer", "pretraining the model"]


def test_configuration_can_be_replayed(tmp_path: Path) -> None:
    assets = Assets(tmp_path / "corpus.jsonl", tmp_path / "model", 9, PretrainResult(1, 1, 8.0, 4.0))
    config = demo_config(assets, RunDir(tmp_path / "run"), TINY)
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert (loaded.model, loaded.data, loaded.probe) == (config.model, config.data, config.probe)
    assert loaded.output_dir == str(tmp_path / "run")
    assert (config.probe.mode, config.probe.epochs, config.deepspeed) == ("train", 1, None)
    assert config.selection.fraction == 0.1


def test_run_is_started_as_a_user_would(tmp_path: Path) -> None:
    command = run_command(tmp_path / "config.yaml", 3)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "3"
    assert command[-5:] == ["-m", "grads_dist", "run", "--config", str(tmp_path / "config.yaml")]


def test_earlier_run_is_kept_on_request(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="output_dir"):
        demo(str(tmp_path), overwrite=False, size=TINY)
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_earlier_assets_are_kept_on_request(tmp_path: Path) -> None:
    corpus = tmp_path / "run_assets" / "corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_text("mine")
    with pytest.raises(ConfigError, match="output_dir: .*run_assets"):
        demo(str(tmp_path / "run"), overwrite=False, size=TINY)
    assert corpus.read_text() == "mine" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_a_folder_without_a_name_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="output_dir: .*a folder with a name"):
        demo(folder, overwrite=True, size=TINY)
