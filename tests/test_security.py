"""Hostile corpora, configuration, models and run directories: each attack is tried, with what it would leave.

A payload touches the file `mark` if it ever runs; what is not refused has to work without it.
"""

import json
import os
import pickle
import shutil
import tarfile
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import CHATML, build, chat, make_tokenizer, write_jsonl
from fuzz_corpus import check_line
from fuzz_tables import Trap
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from selection_tables import clustered_features, score_table
from workspace import make_model

from grads_dist import cli
from grads_dist.config import Config, load_config
from grads_dist.data import template as templates
from grads_dist.data.config import DataConfig
from grads_dist.data.hub import fetch
from grads_dist.data.tokenizer import TokenizerSource, load_tokenizer
from grads_dist.errors import ConfigError, DataError, GradsDistError
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import build_on_meta, load_model, load_text_config
from grads_dist.probe.zero import REFUSED_ENABLED, load_deepspeed_config
from grads_dist.runtime import logs
from grads_dist.runtime.rundir import MARKER, RunDir, atomic_write
from grads_dist.selection.config import SelectionConfig
from grads_dist.similarity import store

CPU = torch.device("cpu")


@pytest.fixture
def mark(tmp_path):
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "code of the attacker ran"


@pytest.fixture
def refused():
    """Asserts that the block is refused in one line that says so much."""

    class Refused:
        def __init__(self, *parts):
            self.parts = parts

        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            assert isinstance(error, GradsDistError), error
            check_line(str(error))
            for part in self.parts:
                assert part in str(error)
            return True

    return Refused


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model with an adapter, both as they should be."""
    folder = tmp_path_factory.mktemp("sound")
    make_model(folder / "model")
    model = load_model(ModelConfig(name_or_path=str(folder / "model")), torch.float32, CPU)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound / "model", tmp_path / "model")


@pytest.fixture
def adapter(sound, tmp_path):
    return shutil.copytree(sound / "adapter", tmp_path / "adapter")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(model, **options):
    return load_model(ModelConfig(name_or_path=str(model), **options), torch.float32, CPU)


def weights_as(model, name, content):
    weights = model / "model.safetensors"
    if weights.exists():
        weights.unlink()
    if name.endswith("raw"):
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, model / "pytorch_model.bin")


def python(mark):
    """A Python file that touches `mark` when it is imported."""
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"


# ---- pickles


@pytest.mark.parametrize("kind", ["zip", "raw"])
def test_a_model_of_pickled_code_is_refused(model, mark, refused, kind):
    weights_as(model, kind, {"model.embed_tokens.weight": Trap(mark)})
    with refused("model.name_or_path", "could run code", "allowed: safetensors"):
        load(model)


def test_a_pickle_of_tensors_alone_is_loaded(model):
    tensors = load_file(model / "model.safetensors")
    weights_as(model, "zip", tensors)
    found = load(model).state_dict()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_leads_to_a_pickle_elsewhere_is_refused(model, tmp_path, mark, refused, index):
    (model / "model.safetensors").unlink()
    torch.save({"a": Trap(mark)}, tmp_path / "elsewhere.bin")
    weight_map = {"model.embed_tokens.weight": "../elsewhere.bin"}
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with refused("model.name_or_path"):
        load(model)


def test_pickles_beside_the_weights_are_not_read(model, mark):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.pkl"):
        torch.save(Trap(mark), model / name)
    load(model)
    load_tokenizer(TokenizerSource(str(model)))


def test_an_adapter_of_pickled_code_is_refused(sound, adapter, mark, refused):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Trap(mark)}, adapter / "adapter_model.bin")
    with refused("model.adapter"):
        load(sound / "model", adapter=str(adapter))


@pytest.mark.parametrize(
    "name", ["c.pt", "c.pkl", "c.npy", "c.jsonl", "c.json", "c.arrow", "c.parquet", "c.csv"]
)
def test_a_pickle_is_no_corpus(tmp_path, mark, refused, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap(mark)))
    with refused("data.path"):
        build(tmp_path, tmp_path / name, make_tokenizer(tmp_path / "m"), format="text")


def test_features_and_neighbours_are_never_unpickled(tmp_path, mark, capsys):
    np.save(tmp_path / "f.npy", np.array([[Trap(mark)]] * 20, dtype=object), allow_pickle=True)
    pq.write_table(score_table(20), tmp_path / "own.parquet")
    args = ["select", "--table", str(tmp_path / "own.parquet"), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*args, "--features", str(tmp_path / "f.npy")]) == DataError.exit_code
    assert "features: " in capsys.readouterr().err

    graph = tmp_path / "graph"
    graph.mkdir()
    np.save(graph / "ids.npy", np.array([Trap(mark)], dtype=object), allow_pickle=True)
    (graph / "graph.json").write_text(
        json.dumps({"key": "k", "arrays": {"ids": ["object", [1]]}, "search": {}})
    )
    assert store.load(graph, "k") is None


def test_a_token_store_is_never_unpickled(tmp_path, mark, refused):
    model, path = make_tokenizer(tmp_path / "m"), write_jsonl(tmp_path / "c.jsonl", [chat("a", "b")])
    cached = build(tmp_path, path, model).path
    np.save(cached / "tokens.npy", np.array([Trap(mark)], dtype=object), allow_pickle=True)
    with refused("no whole token store"):
        build(tmp_path, path, model)


# ---- code that a repository brings along


def hostile_code(model, mark, model_type):
    (model / "evil.py").write_text(
        python(mark) + "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'evil'\nclass M(LlamaForCausalLM):\n    config_class = C\n"
    )
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit(model / "config.json", auto_map=names, model_type=model_type)


def test_code_of_a_model_is_not_imported(model, mark, refused):
    hostile_code(model, mark, "evil")
    for action in (load_text_config, build_on_meta, lambda config: load(model)):
        with refused("Python code of its own", "model.trust_remote_code: true"):
            action(ModelConfig(name_or_path=str(model)))


def test_a_known_model_is_loaded_without_the_code_beside_it(model, mark):
    hostile_code(model, mark, "llama")
    assert type(load(model)).__module__.startswith("transformers.models.llama")


def test_code_of_a_tokenizer_is_not_imported(model, mark, refused):
    (model / "tok.py").write_text(python(mark))
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.T", "tok.T"]}, tokenizer_class="T")
    with refused("the tokenizer of", "Python code of its own", "model.trust_remote_code: true"):
        load_tokenizer(TokenizerSource(str(model)))


NAMED_KERNELS = {
    "attention": {"attn_implementation": "someone/kernels@main"},
    "attribute": {"_attn_implementation": "someone/kernels@main"},
    "internal": {"_attn_implementation_internal": "someone/kernels@main"},
    "experts": {"experts_implementation": "someone/kernels@main"},
    "paged": {"attn_implementation": "paged|someone/kernels@main"},
    "map": {"attn_implementation": {"vision_config": "someone/kernels@main"}},
    "map of maps": {"attn_implementation": {"": "sdpa", "a": {"b": ["eager", "someone/kernels@main"]}}},
    "experts of a part": {"experts_implementation": {"text_config": "someone/kernels@main"}},
    "part": {"vision_config": {"attn_implementation": "someone/kernels@main"}},
    "part of a part": {"a": {"b": [{"_experts_implementation": {"": "someone/kernels@main"}}]}},
    "layer": {"per_layer_config": {"0": {"attn_implementation": "someone/kernels@main"}}},
}


@pytest.mark.parametrize("name", NAMED_KERNELS)
def test_kernels_that_a_model_names_are_not_fetched(model, adapter, refused, monkeypatch, name):
    def fetch(*args, **kwargs):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", fetch)
    edit(model / "config.json", **NAMED_KERNELS[name])
    for options in ({}, {"adapter": str(adapter)}):
        for action in (
            load_text_config,
            build_on_meta,
            lambda config: load_model(config, torch.float32, CPU),
        ):
            with refused("someone/kernels@main", "code of the hub"):
                action(ModelConfig(name_or_path=str(model), **options))


@pytest.mark.parametrize("name", ["deepgemm", "sonicmoe", "kernels", "eager/", ""])
def test_implementations_of_unknown_names_are_refused(model, refused, name):
    edit(model / "config.json", experts_implementation=name)
    with refused("experts_implementation", "allowed: "):
        load(model)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "eager"},
        {"_attn_implementation": "sdpa", "_attn_implementation_autoset": True},
        {"attn_implementation": None, "experts_implementation": {"": "eager", "text_config": "grouped_mm"}},
    ],
)
def test_implementations_that_transformers_brings_may_be_named(model, values):
    edit(model / "config.json", **values)
    load(model)


def test_modules_that_an_adapter_names_are_not_imported(sound, adapter, tmp_path, mark, refused, monkeypatch):
    (tmp_path / "evil_core.py").write_text(python(mark))
    monkeypatch.syspath_prepend(tmp_path)
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil_core")
    for action in (build_on_meta, lambda config: load(config.name_or_path, adapter=config.adapter)):
        with refused("model.adapter", "megatron_config"):
            action(ModelConfig(name_or_path=str(sound / "model"), adapter=str(adapter)))


def test_the_class_that_an_adapter_names_is_not_imported(sound, adapter, tmp_path, mark, monkeypatch):
    (tmp_path / "evil_library.py").write_text(python(mark))
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "X", "parent_library": "evil_library"}
    edit(adapter / "adapter_config.json", auto_mapping=mapping)
    load(sound / "model", adapter=str(adapter))


def test_a_model_folder_cannot_name_another_model(model, adapter, refused):
    shutil.copy(adapter / "adapter_config.json", model)
    with refused("is an adapter"):
        load(model)


def test_the_payloads_work_where_they_are_let(model, tmp_path):
    """Else the tests of this file would say nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "unpickled")))
    hostile_code(model, tmp_path / "imported", "evil")
    load_text_config(ModelConfig(name_or_path=str(model), trust_remote_code=True))
    assert (tmp_path / "unpickled").exists() and (tmp_path / "imported").exists()


def test_the_program_ends_with_one_line(model, tmp_path, mark, capsys):
    hostile_code(model, mark, "evil")
    corpus = write_jsonl(tmp_path / "c.jsonl", [chat("a", "b")])
    args = [
        "--model.name_or_path",
        str(model),
        "--data.path",
        str(corpus),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert cli.main(["run", *args]) == ConfigError.exit_code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and "trust_remote_code" in shown.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [{}, {"split": "train"}, {"name": "default"}])
def test_a_loading_script_is_not_run(tmp_path, mark, refused, option):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(python(mark))
    write_jsonl(folder / "a.jsonl", [chat("a", "b")])
    # As a plain folder it has one file of rows; as a dataset it would be made by its script.
    with refused("data.path", "script") if option else nullcontext():
        build(tmp_path, folder, make_tokenizer(tmp_path / "m"), **option)


def test_pickles_in_archives_are_not_read(tmp_path, mark, refused):
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in ("0.pth", "0.pkl", "0.json"):
            content = b'{"text": "abc"}' if name == "0.json" else pickle.dumps(Trap(mark))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    with refused("data.path", "cannot be loaded as a dataset"):
        fetch(str(folder), DataConfig(str(folder), split="train", cache_dir=str(tmp_path / "cache")))


# ---- configuration


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "data: !!python/object/apply:pathlib.Path.touch ['MARK']",
        "data: {path: !!python/name:os.system}",
        "data: !include other.yaml",
        "data: other.yaml",
        "data: {path: x}\nselection: {weights: other.yaml}",
        "data: {path: x}\nconfig: other.yaml",
        "data: {class_path: os.system, init_args: {command: touch MARK}}",
        "class_path: os.system\ndata: {path: x}",
    ],
)
def test_a_configuration_file_names_no_code_and_no_other_file(tmp_path, mark, refused, text):
    (tmp_path / "other.yaml").write_text("path: found\ng: 7\n")
    (tmp_path / "c.yaml").write_text(text.replace("MARK", str(mark)))
    os.chdir(tmp_path)
    with refused():
        load_config(tmp_path / "c.yaml")


def test_variables_and_commands_in_values_stay_text(tmp_path, mark):
    path = f"$HOME/`touch {mark}`/$(touch {mark})/{{{{ 7 * 7 }}}}"
    (tmp_path / "c.yaml").write_text(json.dumps({"data": {"path": path}}))
    assert load_config(tmp_path / "c.yaml").data.path == path


@pytest.mark.parametrize("name", ["..", "../up", "/etc", "a/b", "a\0b", ".hidden", "", "a\n", "-", "x" * 200])
def test_the_name_of_a_selection_is_a_folder_name(refused, name):
    with refused("selection.name"):
        SelectionConfig(name=name)


@pytest.mark.parametrize("field", ["output_dir", "deepspeed"])
def test_no_path_has_a_nul(refused, field):
    with refused(field):
        Config(data=DataConfig("x"), **{field: "a\0b"})


@pytest.mark.parametrize("key", REFUSED_ENABLED)
def test_a_deepspeed_file_writes_nothing_of_its_own(tmp_path, refused, key):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: {"enabled": True, "output_path": "/tmp", "backend": "evil.module"}}))
    with refused("deepspeed", key):
        load_deepspeed_config(str(path))
    path.write_text(json.dumps({key: {"enabled": False}}))
    assert load_deepspeed_config(str(path))[key] == {"enabled": False}


# ---- chat templates

HOSTILE_TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "init": "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "mutation": "{{ messages.pop() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ 'x' * 10 ** 15 }}",
    "width": "{{ '%999999999999999d' % 1 }}",
    "digits": "{{ 10 ** 5000 }}",
    "depth": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "length": "{{ 'x' * (2 ** 24 + 1) }}",
    "escape": "{{ raise_exception('\x1b]0;owned\x07\x1b[31m') }}",
    "break": "{% break %}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
@pytest.mark.parametrize("is_own", [True, False], ids=["model", "file"])
def test_a_hostile_template_does_nothing(tmp_path, mark, refused, name, is_own):
    text = HOSTILE_TEMPLATES[name].replace("MARK", str(mark)) + CHATML
    model = make_tokenizer(tmp_path / "m", text if is_own else CHATML)
    (tmp_path / "t.jinja").write_text(text)
    option = {} if is_own else {"chat_template": str(tmp_path / "t.jinja")}
    corpus = write_jsonl(tmp_path / "c.jsonl", [chat("a", "b")])
    with refused("template"):
        build(tmp_path, corpus, model, **option)


@pytest.mark.parametrize("body", ["{% for j in range(99999) %}{% endfor %}", "{{ lipsum(n=99999) }}"])
def test_a_template_without_an_end_is_stopped(tmp_path, refused, monkeypatch, body):
    monkeypatch.setattr(templates, "LONGEST_RENDERING", 0.2)
    model = make_tokenizer(tmp_path / "m", "{% for i in range(99999) %}" + body + "{% endfor %}" + CHATML)
    corpus = write_jsonl(tmp_path / "c.jsonl", [chat("a", "b")])
    with refused("data.chat_template", "takes more than"):
        build(tmp_path, corpus, model)
    # Nothing is left that would stop what comes after.
    assert build(tmp_path, corpus, make_tokenizer(tmp_path / "m2")).num_rows == 1


# ---- files that name other files


@pytest.mark.parametrize("name", ["../saved/data-00000-of-00001.arrow", "/etc/passwd", "..", "a\0b", 5, None])
def test_a_saved_dataset_names_files_of_its_own_alone(tmp_path, refused, name):
    datasets.Dataset.from_list([chat("a", "b")]).save_to_disk(tmp_path / "saved")
    folder = shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    edit(folder / "state.json", _data_files=[{"filename": name}])
    with refused("data.path"):
        build(tmp_path, folder, make_tokenizer(tmp_path / "m"))


@pytest.mark.parametrize("split", ["../saved", "/etc", "..", "a\0b"])
def test_a_split_lies_in_its_dataset(tmp_path, refused, split):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with refused("data.path"):
        build(tmp_path, tmp_path / "set", make_tokenizer(tmp_path / "m"))


@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json"])
def test_a_description_without_an_end_is_refused(tmp_path, refused, name):
    (tmp_path / name).write_text("[" * 100_000)
    with refused("data.path", name):
        build(tmp_path, tmp_path, make_tokenizer(tmp_path / "m"))


def test_a_pipe_is_not_waited_for(tmp_path, refused):
    os.mkfifo(tmp_path / "c.jsonl")
    for path in (tmp_path, tmp_path / "c.jsonl"):
        with refused("data.path", "is no file"):
            build(tmp_path, path, make_tokenizer(tmp_path / "m"))


@pytest.mark.parametrize(
    "path", ["../../etc", "/etc/passwd", "a/../../b", "\0", "y" * 5000, "/dev/zero", "http://h/x.jsonl"]
)
def test_odd_paths_end_in_one_line(tmp_path, refused, path):
    with refused("data.path"):
        build(tmp_path, path, make_tokenizer(tmp_path / "m"))


# ---- run directories


@pytest.fixture
def elsewhere(tmp_path):
    """A folder that nothing may be written to."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "rank-00000.log").write_text("mine")
    (folder / "shard-0.parquet").write_text("mine")
    yield folder
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "rank-00000.log": "mine",
        "shard-0.parquet": "mine",
    }


def hostile_run(tmp_path, link, target):
    """A run directory with a link in it."""
    path = tmp_path / "run" / link
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / MARKER).touch()
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return RunDir(tmp_path / "run")


@pytest.mark.parametrize("link", ["logs", "logs/rank-00000.log", "config.yaml", "rejected.jsonl", MARKER])
def test_a_run_does_not_write_through_links(tmp_path, elsewhere, refused, link):
    target = elsewhere / "rank-00000.log" if "." in link else elsewhere
    with refused("output_dir", "is a link"):
        hostile_run(tmp_path, link, target).create(overwrite=False)


@pytest.mark.parametrize("link", ["scores", "features", "selection", "similarity", "model", "scores.parquet"])
def test_overwriting_removes_a_link_and_not_what_it_leads_to(tmp_path, elsewhere, link):
    rundir = hostile_run(tmp_path, link, elsewhere)
    rundir.create(overwrite=True)
    assert not (rundir.root / link).is_symlink()


@pytest.mark.parametrize("link", ["selection", "selection/default", "similarity", "similarity/f"])
def test_a_selection_does_not_write_through_links(tmp_path, elsewhere, capsys, link):
    hostile_run(tmp_path, link, elsewhere)
    pq.write_table(score_table(20), tmp_path / "own.parquet")
    np.save(tmp_path / "f.npy", clustered_features(20))
    args = ["--features", str(tmp_path / "f.npy"), "--output_dir", str(tmp_path / "run")]
    code = cli.main(
        ["select", "--table", str(tmp_path / "own.parquet"), "--similarity.library", "torch", *args]
    )
    assert code == ConfigError.exit_code
    assert "is a link" in capsys.readouterr().err


def test_a_run_directory_may_itself_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    RunDir(tmp_path / "run").create(overwrite=False)
    assert (tmp_path / "disk" / MARKER).is_file()


def test_a_link_under_a_temporary_name_is_not_written_through(tmp_path, elsewhere):
    (tmp_path / f".tmp-{os.getpid()}-a.txt").symlink_to(elsewhere / "rank-00000.log")
    with atomic_write(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new" and not (tmp_path / "a.txt").is_symlink()


def test_the_lock_of_a_graph_is_no_link(tmp_path, elsewhere, caplog):
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / ".lock").symlink_to(elsewhere / "new")
    with store.locked(tmp_path / "graph"):
        pass
    assert "without a lock" in caplog.text


# ---- what is shown

ESCAPES = "\x1b[31m\x1b]0;owned\x07\u202e"


def test_errors_and_logs_do_nothing_to_a_terminal(tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{ESCAPES: 1, "text" + ESCAPES: "a\x1b[2J"}])
    model = make_tokenizer(tmp_path / "m")
    args = [
        "--data.path",
        str(corpus),
        "--model.name_or_path",
        str(model),
        "--data.cache_dir",
        str(tmp_path / "k"),
    ]
    assert cli.main(["inspect", *args]) != 0
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"{ESCAPES}.txt").touch()
    write_jsonl(tmp_path / "set" / "a.jsonl", [{"text": "abc" + ESCAPES, "id": ESCAPES}])
    assert cli.main(["--data.nothing" + ESCAPES]) == ConfigError.exit_code
    logs.start_console(0)
    assert build(tmp_path, tmp_path / "set", model).num_rows == 1
    captured = capsys.readouterr()
    shown = (captured.out + captured.err).replace("\n", "")
    assert shown.isprintable() and "\\x1b[31m" in shown


def test_a_card_shows_names_and_does_not_carry_them_out(tmp_path):
    """Names of columns are the corpus's own; in the card they can end no code block and no header."""
    name = "a\n---\n```\n</code><script>alert(1)</script>\n# b"
    table = pa.table({"text": ["abc", "def"], name: ["x", "y"]})
    pq.write_table(table, tmp_path / "c.parquet")
    scores = score_table(2)
    pq.write_table(scores, tmp_path / "own.parquet")
    args = ["--selection.weights.d", "0", "--selection.weights.r", "0", "--selection.stratify_by", name]
    args += [
        "--data.path",
        str(tmp_path / "c.parquet"),
        "--data.cache_dir",
        str(tmp_path / "k"),
        "--selection.rows",
        "1",
    ]
    args += ["--table", str(tmp_path / "own.parquet"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["select", *args]) == 0
    card = (tmp_path / "out" / "selection" / "default" / "README.md").read_text()
    lines = card.splitlines()
    assert lines.count("---") == 2 and not any(line.startswith(("# b", "</code>")) for line in lines)
    shown = next(line for line in lines if "<script>" in line)
    # A code span whose fence is longer than any run of backticks inside.
    assert "````" in shown and Path(tmp_path / "c.parquet").exists()
