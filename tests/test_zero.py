"""DeepSpeed files: "auto" values filled in, and what cannot be used refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT

from grads_dist.errors import ConfigError
from grads_dist.model.config import ModelConfig
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.zero import (
    REFUSED,
    check_supported,
    fill_auto,
    load_deepspeed_config,
    probe_dtype,
    zero_stage,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROBE = ProbeConfig(learning_rate=3e-4, max_grad_norm=0.7)
SHIPPED = sorted((ROOT / "launch").glob("*.json"))


def fill(config: dict, dtype=torch.float32, device=CPU, world_size=2, num_steps=10) -> dict[str, Any]:
    ranks: Any = SimpleNamespace(world_size=world_size, device=device)
    return fill_auto(config, PROBE, dtype, 64, num_steps, ranks)


def write(tmp_path: Path, content: object) -> str:
    path = tmp_path / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def values(node: object) -> list[object]:
    return [v for child in node.values() for v in values(child)] if isinstance(node, dict) else [node]


def test_files_are_shipped_for_every_stage_and_offload():
    stages = {path.stem: zero_stage(load_deepspeed_config(str(path))) for path in SHIPPED}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_nvme": 3, "zero3_offload": 3}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_nothing_is_left_auto_in_the_shipped_files(path, device):
    filled = fill(load_deepspeed_config(str(path)), torch.bfloat16, device)
    assert "auto" not in values(filled)
    assert filled["bf16"]["enabled"] is True and filled["fp16"]["enabled"] is False
    assert filled["optimizer"]["params"]["lr"] == 3e-4
    assert filled["gradient_clipping"] == 0.7


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_understood_by_deepspeed(path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    filled = fill(load_deepspeed_config(str(path)), world_size=1)
    parsed = DeepSpeedConfig(filled)
    assert parsed.zero_optimization_stage == zero_stage(filled)
    assert parsed.gradient_clipping == 0.7


def test_without_a_file_it_is_zero2_with_adamw():
    filled = fill(load_deepspeed_config(None))
    assert filled["zero_optimization"]["stage"] == 2
    params = filled["optimizer"]["params"]
    assert filled["optimizer"]["type"] == "AdamW"
    assert (params["lr"], params["betas"], params["eps"], params["weight_decay"]) == (
        3e-4,
        [0.9, 0.999],
        1e-8,
        0.0,
    )


def test_batches_belong_to_the_plan():
    filled = fill({"train_batch_size": 512, "gradient_accumulation_steps": 8}, world_size=3)
    assert filled["train_batch_size"] == 3
    assert filled["train_micro_batch_size_per_gpu"] == filled["gradient_accumulation_steps"] == 1


def test_clipping_is_never_left_to_deepspeed():
    """Unset, DeepSpeed clips as if at 1.0."""
    assert fill({"zero_optimization": {"stage": 1}})["gradient_clipping"] == 0.7
    assert fill({"gradient_clipping": 0.2})["gradient_clipping"] == 0.2


def test_given_values_win_and_the_input_is_untouched():
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1.0, "eps": "auto"}}}
    filled = fill(config)
    assert filled["optimizer"]["params"]["lr"] == 1.0
    assert config == {"optimizer": {"type": "AdamW", "params": {"lr": 1.0, "eps": "auto"}}}


def test_torch_adam_on_cpu_only():
    assert fill({})["optimizer"]["params"]["torch_adam"] is True
    assert "torch_adam" not in fill({}, device=CUDA)["optimizer"]["params"]


def test_a_schedule_knows_its_steps():
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}}
    params = fill({"scheduler": schedule}, num_steps=17)["scheduler"]["params"]
    assert params == {"total_num_steps": 17, "warmup_max_lr": 3e-4}


def test_auto_without_a_rule_is_refused_by_name():
    with pytest.raises(ConfigError, match=r'zero_optimization\.sub_group_size is "auto"'):
        fill({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})


@pytest.mark.parametrize("key", REFUSED)
def test_sections_that_change_gradients_are_refused_by_name(tmp_path, key):
    with pytest.raises(ConfigError, match=key):
        load_deepspeed_config(write(tmp_path, {key: {}}))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"zero_optimization": ', "is not valid JSON"),
        ("[1, 2]", "holds no JSON object"),
        ({"zero_optimization": {"stage": 4}}, "stage 4 is not allowed; it must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, "stage 'auto' is not allowed"),
        ({"zero_optimization": 3}, "zero_optimization is 3"),
        ({"bf16": True}, "bf16 is True"),
    ],
)
def test_files_that_cannot_be_used_are_named_in_one_line(tmp_path, content, word):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_config(path)
    message = str(caught.value)
    assert message.startswith("deepspeed: ") and word in message and "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="gone.json.*cannot be read"):
        load_deepspeed_config(str(tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("wanted", "config", "device", "dtype"),
    [
        ("auto", {}, CPU, torch.float32),
        ("auto", {}, CUDA, torch.bfloat16),
        ("auto", {"fp16": {"enabled": True}}, CUDA, torch.float16),
        ("auto", {"bf16": {"enabled": "auto"}}, CPU, torch.float32),
        ("float32", {"bf16": {"enabled": "auto"}}, CUDA, torch.float32),
    ],
)
def test_type_of_the_weights(wanted, config, device, dtype):
    assert probe_dtype(ModelConfig(name_or_path="m", dtype=wanted), config, device) == dtype


def test_contradicting_types_are_refused():
    with pytest.raises(ConfigError, match="float32 contradicts"):
        probe_dtype(ModelConfig(name_or_path="m", dtype="float32"), {"bf16": {"enabled": True}}, CUDA)


@pytest.mark.parametrize(
    ("mode", "stage", "dtype"),
    [("train", 2, torch.float64), ("frozen", 3, torch.float64), ("train", 0, torch.bfloat16)],
)
def test_types_that_deepspeed_would_spoil_are_refused(mode, stage, dtype):
    with pytest.raises(ConfigError):
        check_supported(ProbeConfig(mode=mode), dtype, stage, CUDA)


def test_float64_is_allowed_where_deepspeed_is_not_involved():
    check_supported(ProbeConfig(mode="frozen"), torch.float64, 2, CPU)
