"""The configuration: saved and loaded as it was, and every bad value named in one line."""

import dataclasses

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grads_dist.config import Config, load_config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.errors import ConfigError
from grads_dist.model.config import ModelConfig
from grads_dist.parsing import build, describe, field_type, make_parser, parse
from grads_dist.probe.config import ProbeConfig
from grads_dist.selection.config import SelectionConfig

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(str.strip)


def parsed(*args):
    parser = make_parser("test", Config, "")
    return build(parser, parse(parser, args, Config), Config)


def test_defaults_fill_in_everything_but_the_data():
    config = parsed("--data.path", "a.jsonl")
    assert config == Config(data=DataConfig(path="a.jsonl"))
    assert config.output_dir == "run" and config.deepspeed is None


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {path: a.jsonl, max_length: 77}\nprobe: {mode: frozen, learning_rate: 1e-4}\n")
    config = parsed("--config", str(path), "--probe.mode", "train", "--data.columns.id", "uid")
    assert config.data == DataConfig(path="a.jsonl", max_length=77, columns={"id": "uid"})
    assert config.probe == ProbeConfig(mode="train", learning_rate=1e-4)


def test_targets_are_a_list_or_a_map():
    assert parsed("--data.path=x", "--probe.targets=[layers, linear]").probe.targets == ["layers", "linear"]
    pattern = r"model\.layers\.0\..*"
    assert parsed("--data.path=x", "--probe.targets", f"{{first: '{pattern}'}}").probe.targets == {
        "first": pattern
    }


def test_a_saved_default_is_loaded_equal(tmp_path):
    config = Config(data=DataConfig(path="a.jsonl"))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(saved) == [f.name for f in dataclasses.fields(Config)]
    assert saved["probe"]["global_batch"] == ProbeConfig().global_batch


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=TEXT | st.lists(TEXT, min_size=1, max_size=3),
    targets=st.lists(TEXT, min_size=1) | st.dictionaries(TEXT, TEXT, min_size=1, max_size=3),
    learning_rate=st.floats(0, 1),
    rows=st.none() | st.integers(1, 10**9),
    name=st.none() | TEXT,
)
def test_any_saved_configuration_is_loaded_equal(tmp_path, path, targets, learning_rate, rows, name):
    config = Config(
        model=ModelConfig(name_or_path=name),
        data=DataConfig(path=path, columns={"id": "a b"}),
        probe=ProbeConfig(targets=targets, learning_rate=learning_rate, warmup=0.25),
        selection=SelectionConfig(rows=rows),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


AMBIGUOUS = st.sampled_from(
    [
        "1e3",
        "1E+3",
        "[a]",
        "- x",
        "#x",
        "null",
        "~",
        "a: b",
        "{a: 1}",
        "'x'",
        "true",
        "yes",
        "0x1F",
        "1_000",
        "-",
    ]
    + [
        "---",
        "!!x",
        "&a",
        "*a",
        "%x",
        "@x",
        " x ",
        "a\nb",
        "x #y",
        "a:",
        "2020-01-01",
        "1:30",
        ".nan",
        "\x85 \x07",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=AMBIGUOUS, other=AMBIGUOUS, band=st.sampled_from([(0.1, 0.9), [0.1, 0.9]]))
def test_text_that_looks_like_yaml_stays_text(tmp_path, text, other, band):
    path = text if len(text) % 2 else [text, other]
    config = Config(
        model=ModelConfig(name_or_path=text, revision=other),
        data=DataConfig(path=path, columns={"id": other}, cache_dir=other),
        probe=ProbeConfig(targets={text: other} if len(other) % 2 else [text]),
        selection=SelectionConfig(signal=[text, other], band=band),
        deepspeed=other,
        output_dir=text,
    )
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == config
    assert type(loaded.output_dir) is str and type(loaded.model.revision) is str
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert saved["output_dir"] == text and saved["selection"]["band"] == [0.1, 0.9]


def test_null_and_numbers_in_a_file_are_what_they_look_like(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {revision: null}\ndata: {path: x}\nprobe: {learning_rate: 1e-3}\n"
    )
    loaded = load_config(tmp_path / "c.yaml")
    assert loaded.model.revision is None and loaded.probe.learning_rate == 1e-3
    assert parsed("--data.path=x", "--model.revision=null").model.revision is None


BAD_ARGUMENTS = [
    ([], "data.path: not given, but needed; allowed: text or a list of text"),
    (["--probe.mode", "foo"], "probe.mode: 'foo' is not allowed; allowed: train, frozen"),
    (["--probe.mode", "a\nb"], "probe.mode: 'a b' is not allowed; allowed: train, frozen"),
    (["--probe.mode"], "probe.mode: no value is given; allowed: train, frozen"),
    (["--probe.global_batch", "1.5"], "probe.global_batch: '1.5' is not allowed; allowed: a whole number"),
    (
        ["--model.trust_remote_code", "maybe"],
        "model.trust_remote_code: 'maybe' is not allowed; allowed: true",
    ),
    (
        ["--probe.targets", "layers"],
        "probe.targets: 'layers' is not allowed; allowed: a list of text or a map",
    ),
    (
        ["--probe.targets", "[1, 2]"],
        "probe.targets: '[1, 2]' is not allowed; allowed: a list of text or a map",
    ),
    (["--selection.weights.g", "x"], "selection.weights.g: 'x' is not allowed; allowed: a number"),
    (
        ["--probe.nope", "1"],
        "probe.nope: '1' is given, but there is no such field; allowed in probe: mode, t",
    ),
    (["--nope=1"], "nope: '1' is given, but there is no such field; allowed at the top level: model, data"),
    (
        ["--selection.weights.x", "1"],
        "selection.weights.x: '1' is given, but there is no such field; allowed in",
    ),
    (["--probe.mod", "train"], "probe.mod: 'train' is given, but there is no such field"),
    (["--probe.mode.x", "1"], "probe.mode.x: no such field; allowed: train, frozen for probe.mode"),
    (["--model", "gpt2"], "model: this value is not allowed; allowed: a map with name_or_path, revision"),
    (
        ["--model", "{nope: 1}"],
        "model: this value is not allowed; allowed: a map with name_or_path, revision",
    ),
    (["stray"], "arguments: 'stray' is not allowed; allowed: flags such as --config FILE"),
    (["--config", "missing.yaml"], "config: 'missing.yaml' cannot be read (No such file or directory)"),
    (["--data.path=x", "--probe.global_batch=0"], "probe.global_batch: 0 is not allowed"),
    (["--data.path=x", "--selection.fraction=2"], "selection.fraction: 2.0 is not allowed"),
    (["--data.path=x", "--selection.fraction=0"], "selection.fraction: 0.0 is not allowed"),
    (["--data.path=x", "--output_dir="], "output_dir: '' is not allowed; allowed: a path"),
]


@pytest.mark.parametrize(("args", "message"), BAD_ARGUMENTS, ids=lambda v: " ".join(v)[:40] if v else "-")
def test_a_bad_argument_is_named_in_one_line(args, message):
    with pytest.raises(ConfigError) as caught:
        parsed(*args)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


BAD_FILES = [
    (b"a: [1\nb: {", "is not valid YAML ("),
    (b"- 1", "holds '[1]'; allowed: a map with model, data, probe"),
    (b"\xff\xfe\xfa", "is not YAML text"),
    (
        b"data: {path: x, nope: {y: 1}}",
        "data.nope: \"{'y': 1}\" is given, but there is no such field; allowed in data:",
    ),
    (b"nope: 3", "nope: '3' is given, but there is no such field; allowed at the top level: model"),
    (b"data.path: x", "data.path: 'x' is given, but there is no such field; allowed at the top level"),
    (b"selection: {weights: {z: 1}}", "selection.weights.z: '1' is given"),
    (b"data: {path: x}\nprobe: {mode: 3}", "probe.mode: '3' is not allowed; allowed: train, frozen"),
    (b"data: x.jsonl", "data: 'x.jsonl' is not allowed; allowed: a map with path, format"),
    (b"data: {path: x}\nprobe: {targets: {a: 1}}", "probe.targets: "),
    (b"# nothing", "is empty; allowed: a map with model, data"),
    (b"probe: {mode: frozen}", "data.path: not given, but needed"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=lambda v: str(v)[:30])
def test_a_bad_file_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("data: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "c.yaml")


def test_every_field_has_a_help_line():
    helps = {action.dest: action.help or "" for action in make_parser("test", Config, "")._actions}
    lacking = [key for key, text in helps.items() if len(text.split()) < 3]
    assert "probe.mode" in helps and "selection.weights.g" in helps
    assert lacking == []


def test_describe_names_what_is_allowed():
    assert describe(str | None) == "text or null"
    assert describe(field_type(Config, "selection.gradient")).startswith("density, magnitude,")
    assert describe(field_type(Config, "data.columns")) == "a map from text to text"
    assert field_type(Config, "data.path.x") is None and field_type(Config, "nope") is None
