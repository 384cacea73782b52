"""Names of the hub where it does not answer: asked once, then its cache on this machine or one line."""

from __future__ import annotations

import json
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import clean_environment
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from workspace import make_model, make_rows, write_jsonl

from grads_dist.data.reach import cache_alone, is_reached, unreached
from grads_dist.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"

LOAD = """
import json, sys, torch
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.tokenizer import TokenizerSource, load_tokenizer
from grads_dist.errors import ConfigError
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import build_on_meta, load_model, load_text_config

model, adapter, dataset, folder = sys.argv[1:]

def loaded(**options):
    return load_model(ModelConfig(name_or_path=model, **options), torch.float32, torch.device("cpu"))

ways = {
    "config": lambda: load_text_config(ModelConfig(name_or_path=model)).hidden_size,
    "meta": lambda: type(build_on_meta(ModelConfig(name_or_path=model, adapter=adapter))).__name__,
    "weights": lambda: float(loaded().get_input_embeddings().weight.double().sum()),
    "adapter": lambda: sum("lora" in name for name, _ in loaded(adapter=adapter).named_parameters()),
    "adapter alone": lambda: build_on_meta(ModelConfig(name_or_path=folder, adapter=adapter)) and 1,
    "tokenizer": lambda: len(load_tokenizer(TokenizerSource(model))),
    "dataset": lambda: Corpus.open(DataConfig(dataset, cache_dir=folder + "/cache")).num_rows,
}
found = {}
for name, way in ways.items():
    try:
        found[name] = way()
    except ConfigError as error:
        found[name] = f"error: {error}"
print(json.dumps(found))
"""


class Silent(socketserver.ThreadingTCPServer):
    """Stands for a hub that hangs up; keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.asked: list[str] = []

    def process_request(self, request, client_address):  # type: ignore[no-untyped-def]
        """Hang up."""
        self.asked.append(request.recv(1000).decode().partition("\r")[0])
        self.shutdown_request(request)

    def check_asked_once(self, *names: str) -> None:
        """Whether it answers, and for none of these names; the library has lists of its own to fetch."""
        assert self.asked.count("HEAD / HTTP/1.1") == 1
        assert not [question for question in self.asked for name in names if name in question]


@pytest.fixture
def silent() -> Iterator[Silent]:
    with Silent() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HF_HOME that holds a model, an adapter and a dataset of the hub, and a folder with the model."""
    import datasets

    home = tmp_path_factory.mktemp("home")
    folder = make_model(home / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(home / "lora")
    for name, source in (("org--tiny", folder), ("org--lora", home / "lora")):
        repository = home / "hub" / f"models--{name}"
        shutil.copytree(source, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    (home / "rows").mkdir()
    write_jsonl(home / "rows" / "train.jsonl", make_rows(7))
    found = datasets.load_dataset(str(home / "rows"), cache_dir=str(home / "made"))["train"]
    version = Path(found.cache_files[0]["filename"]).parent
    shutil.copytree(version, home / "datasets" / "org___rows" / "default" / "0.0.0" / version.name)
    return home


def load(home: Path, server: Silent, *names: str) -> dict[str, object]:
    """What every way to load gives for a model, an adapter and a dataset."""
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment = clean_environment(**variables)
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", LOAD, *names, str(home / "model")]
    done = subprocess.run(command, cwd=home, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "hub" not in done.stderr or endpoint in done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_is_nowhere_is_named_after_one_question(home: Path, silent: Silent) -> None:
    names = ("models/my-lama", "models/my-lora", "data/nothere")
    found = load(home, silent, *names)
    silent.check_asked_once(*names)
    for way, name in {
        "config": "model.name_or_path: 'models/my-lama'",
        "meta": "model.name_or_path: 'models/my-lama'",
        "weights": "model.name_or_path: 'models/my-lama'",
        "adapter": "model.name_or_path: 'models/my-lama'",
        "adapter alone": "model.adapter: 'models/my-lora'",
        "tokenizer": "model.name_or_path: the tokenizer of 'models/my-lama'",
        "dataset": "data.path: 'data/nothere'",
    }.items():
        line = str(found[way])
        assert line.startswith(f"error: {name} is ") and "\n" not in line
        assert f"http://127.0.0.1:{silent.server_address[1]} does not answer" in line


def test_what_the_cache_holds_is_loaded_after_one_question(home: Path, silent: Silent) -> None:
    names = ("org/tiny", "org/lora", "org/rows")
    found = load(home, silent, *names)
    silent.check_asked_once(*names)
    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    total = float(model.get_input_embeddings().weight.double().sum())
    assert found == {
        "config": 16, "meta": "LlamaForCausalLM", "weights": total, "adapter": 4, "adapter alone": 1,
        "tokenizer": model.config.vocab_size, "dataset": 7,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["./models/my-lama", "/gone/model", "~/gone", "..", "a/b/c"])
def test_what_can_only_be_a_folder_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grads_dist.data.reach.unreached", pytest.fail)
    monkeypatch.chdir("/")
    if name == "..":
        assert not cache_alone(name, "model.name_or_path")
        return
    with pytest.raises(ConfigError) as failure:
        cache_alone(name, "model.name_or_path")
    assert str(failure.value) == f"model.name_or_path: no folder {name!r}"


@pytest.mark.parametrize(("status", "answers"), [(200, True), (404, True), (401, True), (503, False)])
def test_a_hub_that_is_down_does_not_answer(
    status: int, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status))
    monkeypatch.setattr("grads_dist.data.reach.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    unreached.cache_clear()
    try:
        assert is_reached() == answers
        assert cache_alone("org/name", "model.name_or_path") != answers
        assert not cache_alone("/", "model.name_or_path")
    finally:
        unreached.cache_clear()
