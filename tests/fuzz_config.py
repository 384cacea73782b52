"""Hostile configuration: YAML files, flags, DeepSpeed files and launcher variables; what must hold of each.

What can be used gives a configuration that is loaded equal once saved; all else raises a ConfigError of one
printable line that begins with a field. Nothing else may escape, and nothing may hang.
"""

from __future__ import annotations

import functools
import json
import re
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints
from unittest import mock

import torch
import yaml
from fuzz_corpus import TEXTS, VALUES, check_line
from hypothesis import strategies as st

from grads_dist import config as configuration
from grads_dist.config import Config, load_config, save_config
from grads_dist.errors import ConfigError
from grads_dist.model.config import ModelConfig
from grads_dist.parsing import build, make_parser, parse
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.zero import check_supported, fill_auto, load_deepspeed_config, probe_dtype, zero_stage
from grads_dist.runtime.launcher import place

_FIELD = re.compile(r"\S.{0,160}?: ")

# ---- documents

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_DOCUMENTS = [
    "", "null", "[]", "text", "3", "---\n---\n", "a: 1\n---\nb: 2\n", "data: {path: x}\n---\n",
    "%YAML 9.9\n---\n", "\ta: 1", "data:\n\tpath: x", "data: {path: a\x00b}", "\ufeffdata: {path: x}",
    "data: {path: x}\r\n", "data: {path: x, path: y}", "data: &d {path: x}\nprobe: *d", "? [1, 2]\n: 3",
    "1: 2", "null: 3", "true: {}", "data: {<<: {path: x}}", "<<: [{data: {path: x}}]", "<<: 3",
    "data: &x {path: *x}", "data: &x [*x]", "&x a: *x", "!!python/object/apply:os.system [\"true\"]",
    "data: !!python/object:builtins.dict {}", "data: !!python/name:os.system", "data: !include x.yaml",
    "data: !!binary aGk=", "data: !!set {a, b}", "data: {path: 2001-01-01}", "data: {path: 2001-13-45}",
    "data: {path: 12:30:45}", "data: {path: 0o17, max_length: 0o17}", "data: {path: x, max_length: 1e400}",
    "data: {path: x, max_length: .nan}", "data: {path: x, limit: 1_000}",
    "data: {path: x, max_length: " + "9" * 5000 + "}", "data: {path: x}\nprobe: {learning_rate: .inf}",
    "data: {path: x}\nprobe: {seed: -0x10}", "data: {path: x}\nselection: {band: [.nan, 1]}", _BOMB,
    _BOMB + "data: *i\n", "data: {path: *nothing}", "[" * 3000, "{a: " * 1500, "- " * 2000,
    "data: " + "[" * 500 + "]" * 500, "data: {path: x, columns: " + "{a: " * 200 + "1" + "}" * 200 + "}",
    "data: {path: x}\n" + "k: 1\n" * 5000, "data: {path: x}\ndata.max_length: 3",
    "config: other.yaml\ndata: {path: x}", "data: other.yaml", "data: x\nmodel: y", "class_path: os.system",
    "data: {class_path: os.system, init_args: {command: 'true'}}", "data: {path: x, __class__: y}",
    "model: {name_or_path: !!float 3}\ndata: {path: x}", "data: {path: \"\\ud800\"}",
    "data: {path: '\x1b[31m'}", "@", "`", "%", "&", "*", "!", "|", ">", "data: |\n  path: x", "data: >\n x",
    "'", "\"", "{", "}", "data: {path: x}\n...\nmore", "\x85", "\u2028: 1",
]  # fmt: skip


def _schemas() -> dict[str, Any]:
    """Every dotted field of the configuration and its type."""
    found: dict[str, Any] = {}

    def walk(schema: Any, prefix: str) -> None:
        hints = get_type_hints(schema)
        for field in fields(schema):
            hint = hints[field.name]
            found[prefix + field.name] = hint
            if is_dataclass(hint):
                walk(hint, f"{prefix}{field.name}.")

    walk(Config, "")
    return found


FIELDS = sorted(_schemas())
_SOUND: dict[str, list[Any]] = {
    "data.path": ["a.jsonl", ["a.jsonl", "b"], "org/name"],
    "data.format": ["messages", "auto"],
    "data.columns": [{"messages": "talk"}, {}],
    "data.roles": [{"customer": "user"}],
    "data.max_length": [2, 4096],
    "data.limit": [None, 7],
    "model.name_or_path": ["m", None, "1e3", "null", "~"],
    "model.dtype": ["auto", "bfloat16"],
    "probe.mode": ["train", "frozen"],
    "probe.targets": [["layers"], {"first": r"model\.layers\.0\..*"}, ["a: b", "#c"]],
    "probe.learning_rate": [0, 1e-5, 3],
    "probe.warmup": [None, 0.5],
    "probe.features": ["none", ["content"], "content"],
    "probe.seed": [0, 2**31 - 1],
    "similarity.k": [1, 10],
    "selection.name": ["default", "a.b-c", "1e3", "007"],
    "selection.fraction": [None, 0.5, 1],
    "selection.rows": [None, 5],
    "selection.signal": ["paper", ["a.max", "b"]],
    "selection.weights.d": [0, 0.25],
    "selection.band": [[0.1, 0.9]],
    "output_dir": ["run", "a b/c: d"],
}
_SCALARS = st.sampled_from(
    [
        "true", "yes", "off", "~", "null", "1e3", "0x10", "0o17", "017", "1_000", "1:30", ".inf", "-.INF",
        ".nan", "2001-01-01", "2001-01-01 12:00:00", "[", "{", "a: b", "- a", "#", "!!str 3", "!!int x",
        "&a 1", "*a", "'x'", "\"\\x00\"", "<<", "=", "%", "${HOME}", "$(id)", "{{ 7 }}", "../../etc",
        "/etc/passwd", "-", "--", "--config", "\t", "\n", "\x00", "", " ", "9" * 5000, "[" * 300,
        "{class_path: os.system}", "!!python/object/apply:os.system [id]", "a.yaml", "file:///etc/passwd",
        "\ud800",
    ]
)  # fmt: skip
YAML_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | _SCALARS
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS | st.integers() | st.booleans() | st.none(), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def settings_of_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Dotted field -> value: mostly ones that are allowed, and a few others."""
    names = draw(st.lists(st.sampled_from(sorted(_SOUND)), max_size=5, unique=True))
    chosen = {name: draw(st.sampled_from(_SOUND[name])) for name in names}
    chosen.setdefault("data.path", "a.jsonl")
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        name = draw(st.sampled_from(FIELDS) | TEXTS)
        chosen[name] = draw(YAML_VALUES | VALUES)
    if draw(st.integers(0, 9)) == 0:
        del chosen[draw(st.sampled_from(sorted(chosen)))]
    return chosen


def _nested(chosen: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in chosen.items():
        *groups, last = name.split(".")
        place_ = content
        for group in groups:
            if not isinstance(place_.get(group), dict):
                place_[group] = {}
            place_ = place_[group]
        place_[last] = value
    return content


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A configuration file."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(ODD_DOCUMENTS)).encode("utf-8", "surrogatepass")
    if kind == 1:
        return draw(
            st.binary(max_size=40) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass"))
        )
    content = _nested(draw(settings_of_fields()))
    try:
        text = yaml.safe_dump(
            content, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans())
        )
    except yaml.YAMLError:
        text = repr(content)
    raw = text.encode("utf-8", "surrogatepass")
    if kind == 2:
        position = draw(st.integers(0, len(raw)))
        odd = draw(_SCALARS).encode("utf-8", "surrogatepass")
        return raw[:position] + draw(st.binary(max_size=3) | st.just(odd)) + raw[position:]
    return raw


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    """Arguments behind the name of a command."""
    args: list[str] = []
    for name, value in draw(settings_of_fields()).items():
        if draw(st.integers(0, 3)) and isinstance(value, (int, float, str)):
            text = str(value)
        else:
            text = draw(
                _SCALARS | st.just(yaml.dump(value, default_flow_style=True).removesuffix("...\n").strip())
            )
        args += [f"--{name}={text}"] if draw(st.booleans()) else [f"--{name}", text]
    odd = draw(st.sampled_from([
        [], [], [], ["extra"], ["--"], ["-x"], ["--data"], ["--probe={mode: frozen}"], ["--data+=x"],
        ["--data.columns.id=x"], ["--data.columns.id.x=x"], ["--config"], ["--config=/nowhere"],
        ["--nothing.at.all=3"], ["--=x"], ["--probe.targets+=layers"], ["--probe.targets+", "x"],
        ["--data.path.x=3"], ["--data.path+=x"], ["--selection.weights={g: 2}"], ["--selection.weights=5"],
        ["--data=a.yaml"], ["--data={path: z}"], ["--model.class_path=os.system"], ["--data.help"],
    ]))  # fmt: skip
    return [*args, *odd] if draw(st.booleans()) else [*odd, *args]


@contextmanager
def one_parser():
    """Make the parser once for many configurations: most of the time goes there."""
    with mock.patch.object(configuration, "make_parser", _parser):
        yield


@functools.cache
def _parser(prog: str, schema: type, description: str) -> Any:
    return make_parser(prog, schema, description)


def check_document(folder: Path, content: bytes) -> bool:
    """Load a configuration file; whether it can be used."""
    path = folder / "c.yaml"
    path.write_bytes(content)
    return _check(folder, lambda: load_config(path))


def check_flags(folder: Path, args: list[str]) -> bool:
    """Parse arguments as a command does; whether they can be used."""

    def parsed() -> Config:
        parser = _parser("grads-dist", Config, "")
        return build(parser, parse(parser, args, Config), Config)

    return _check(folder, parsed)


def _check(folder: Path, action: Any) -> bool:
    config = _refusal(action)
    if config is None:
        return False
    saved = folder / "saved.yaml"
    save_config(config, saved)
    assert repr(load_config(saved)) == repr(config)
    return True


def _refusal(action: Any) -> Any:
    try:
        return action()
    except ConfigError as error:
        check_line(str(error))
        assert _FIELD.match(str(error)), str(error)
        return None


# ---- DeepSpeed files

_SECTIONS = [
    "zero_optimization",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "steps_per_print",
    "zero",
    "activation_checkpointing",
    "flops_profiler",
    "wall_clock_breakdown",
]
_DS_VALUES = st.sampled_from([
    "auto", 0, 1, 2, 3, 4, True, False, None, "AdamW", "Adam", "SGD", "os.system", 1e400, [], {},
    {"enabled": True}, {"enabled": "auto"}, {"stage": 3}, {"stage": "auto"}, {"stage": True},
    {"type": "AdamW", "params": {"lr": "auto"}}, {"type": "__class__"}, {"type": []}, {"params": 5},
]) | VALUES  # fmt: skip


@st.composite
def deepspeed_files(draw: st.DrawFn) -> bytes:
    """A DeepSpeed JSON file."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from([
            b"", b"[]", b"null", b"NaN", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000,
            b'\xef\xbb\xbf{}',
        ]) | st.binary(max_size=20))  # fmt: skip
    keys = st.sampled_from(_SECTIONS) | TEXTS
    content = draw(
        st.dictionaries(keys, _DS_VALUES | st.dictionaries(keys, _DS_VALUES, max_size=3), max_size=4)
    )
    return json.dumps(content).encode("utf-8", "surrogatepass")


def check_deepspeed(folder: Path, content: bytes) -> bool:
    """Read a DeepSpeed file as a run does before any work; whether it can be used."""
    path = folder / "ds.json"
    path.write_bytes(content)
    cpu = torch.device("cpu")
    ranks: Any = SimpleNamespace(world_size=2, device=cpu)

    def filled() -> Any:
        config = load_deepspeed_config(str(path))
        dtype = probe_dtype(ModelConfig(), config, cpu)
        check_supported(ProbeConfig(), dtype, zero_stage(config), cpu)
        return fill_auto(config, ProbeConfig(), dtype, 64, 10, ranks)

    return _refusal(filled) is not None


# ---- launcher variables

_VARIABLES = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR",
    "MASTER_PORT", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
    "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_STEP_NUM_NODES",
]  # fmt: skip
_VARIABLE_VALUES = st.sampled_from(
    [
        "0", "1", "2", "8", "-1", "", "x", "1.5", "²", "٣", "9" * 5000, "99999", "n[1-3],m", "n[", "[1",
        "2(x3),1", "2(x999999999)", "1(x0)", "a,b", ",", "\x00", "127.0.0.1", "\n",
    ]
)  # fmt: skip
ENVIRONMENTS = st.dictionaries(
    st.sampled_from(_VARIABLES), _VARIABLE_VALUES | st.text(max_size=6), max_size=12
)
"""Variables of torchrun and Slurm; those of MPI would start it."""


def check_environment(variables: dict[str, str]) -> bool:
    """Find the place of a rank; whether there is one."""
    placement = _refusal(lambda: place(variables))
    if placement is None:
        return False
    assert 0 <= placement.rank < placement.world_size
    assert 0 <= placement.local_rank
    assert placement.world_size == 1 or 0 < placement.master_port < 2**16
    return True
