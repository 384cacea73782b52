"""Loading a model for probing: complete, deterministic, in the type asked for, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_model
from torch import nn

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import check_head, dissect
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import disable_dropout, load_model, load_text_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder: Path, dtype=torch.float32, **options) -> nn.Module:
    return load_model(ModelConfig(name_or_path=str(folder), **options), dtype, CPU)


def fault(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith("model.name_or_path: ") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_those_of_the_folder_in_the_type_asked_for(saved, dtype):
    model = load(saved, dtype)
    for name, parameter in tiny_model("llama").named_parameters():
        found = model.get_parameter(name)
        assert found.dtype == dtype and torch.equal(found, parameter.to(dtype)), name


def test_text_config(saved):
    config = load_text_config(ModelConfig(name_or_path=str(saved)))
    assert (config.vocab_size, config.hidden_size) == (VOCAB, 16)


def test_attention_implementation(saved):
    assert load(saved, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_missing_folder_is_named():
    assert "'/gone/model'" in fault(Path("/gone/model"))


def test_a_folder_without_a_model_is_named(tmp_path):
    assert str(tmp_path) in fault(tmp_path)


def test_a_broken_config_is_named(damaged):
    (damaged / "config.json").write_text("{", encoding="utf-8")
    assert str(damaged) in fault(damaged)


def test_an_unknown_architecture_is_named(damaged):
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "unheard"}), encoding="utf-8")
    assert "unheard" in fault(damaged)


def test_weights_cut_short_are_refused(damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    assert str(damaged) in fault(damaged)


def test_a_missing_weight_is_refused_and_not_made_up(damaged):
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in fault(damaged)


def test_a_weight_of_another_shape_is_refused(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert "another shape for model.norm.weight" in fault(damaged)


def random_gpt2() -> nn.Module:
    model = tiny_model("gpt2")
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model


def test_dropout_is_off_in_training_mode():
    model = random_gpt2()
    disable_dropout(model)
    ids = torch.arange(8)[None]
    assert model.training
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def test_attention_dropout_of_a_config_is_off(tmp_path):
    tiny_model("llama", attention_dropout=0.5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}), encoding="utf-8")
    model = load(tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "reentrant"), [("nonreentrant", False), ("reentrant", True)])
def test_gradient_checkpointing(saved, kind, reentrant):
    model = load(saved, gradient_checkpointing=kind)
    assert model.is_gradient_checkpointing
    assert model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


def test_a_random_forward_pass_is_refused():
    model = random_gpt2().train()
    with pytest.raises(ConfigError, match="different logits for the same tokens"):
        check_head(dissect(model), CPU)


def test_logits_changed_behind_the_head_are_refused():
    model = tiny_model("llama")
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = shifted
    with pytest.raises(ConfigError, match="behind the LM head"):
        check_head(dissect(model), CPU)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma2"])
def test_known_models_pass_the_check(architecture):
    model = tiny_model(architecture)
    disable_dropout(model)
    check_head(dissect(model), CPU)
