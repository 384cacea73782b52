"""A target whose layer the model does not call once: found before any row is passed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from workspace import make_model, make_rows, make_tokenizer, run_arguments, write_jsonl, write_stage

from grads_dist.commands import prepare
from grads_dist.errors import ConfigError
from grads_dist.probe.session import Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unread")
    for architecture in ("llama", "mixtral"):
        make_model(folder / architecture, architecture)
    write_jsonl(folder / "corpus.jsonl", make_rows(20))
    return folder


def probe(folder: Path, name: str, model: str, stage: int, **options: Any) -> None:
    fields = {"model.name_or_path": folder / model, "deepspeed": write_stage(folder, stage), **options}
    prepare(["probe", *run_arguments(folder, name, **fields)])()


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passing a batch of rows, or as large as one of rows, fails."""

    def passed(*_: Any, **__: Any) -> None:
        pytest.fail("a row was passed")

    for name in ("features", "rehearse"):
        monkeypatch.setattr(Session, name, passed)
    monkeypatch.setattr("grads_dist.probe.work.collate", passed)


LAYERS: dict[str, tuple[Callable[..., Any], str]] = {
    "no gradient reached model.layers.0.mlp.gate_proj.weight in the backward pass": (
        lambda self, x: self.down_proj(self.up_proj(x)),
        "linear",
    ),
    "model.layers.1.mlp.down_proj is used more than once in a pass, which has no rule": (
        lambda self, x: self.down_proj(self.up_proj(x)) + self.down_proj(self.gate_proj(x)),
        "layers",
    ),
}


@pytest.mark.parametrize("mode", ["frozen", "train"])
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("message", LAYERS)
def test_a_layer_that_is_not_called_once_is_refused_before_any_row(
    folder: Path, mode: str, stage: int, message: str, no_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, target = LAYERS[message]
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    options = {"probe.mode": mode, "probe.targets": f"[{target}]"}
    with pytest.raises(ConfigError) as failure:
        probe(folder, f"{target}-{mode}{stage}", "llama", stage, **options)
    assert str(failure.value) == f"probe.targets: {message}"


def test_a_layer_whose_weights_a_model_uses_apart(folder: Path, no_rows: None) -> None:
    """As Mamba does."""
    tokenizer = make_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(folder / "mamba")
    tokenizer.save_pretrained(folder / "mamba")
    with pytest.raises(ConfigError, match=r"no gradient reached backbone\.layers\.0\.mixer\.dt_proj\.bias"):
        probe(folder, "mamba-run", "mamba", 2, **{"probe.targets": "[linear]"})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_the_check_changes_no_number(
    folder: Path, stage: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the epoch's table nor of the weights that it leads to, to the bit."""
    options = {"probe.targets": "[layers, embedding]", "probe.save_model": True, "probe.learning_rate": 1e-3}
    names = f"with-{model}{stage}", f"without-{model}{stage}"
    probe(folder, names[0], model, stage, **options)
    monkeypatch.setattr(Session, "check_targets", lambda self: None)
    probe(folder, names[1], model, stage, **options)
    found, wanted = (pq.read_table(folder / name / "scores.parquet") for name in names)
    assert found.equals(wanted)
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in names]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
