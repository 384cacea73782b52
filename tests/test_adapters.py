"""LoRA adapters, on plain and on quantised bases."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_oracle import assert_equal, double, kinds_of, probe
from tiny import Rows, autograd_gradients, five, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import dissect
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import build_on_meta, load_model
from grads_dist.stats.targets import resolve_targets

MODULES = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "falcon": ["query_key_value"],
    "mixtral": ["q_proj", "o_proj"],
}
CPU = torch.device("cpu")


def adapted(architecture, **options):
    options = {"r": 3, "target_modules": MODULES[architecture], "init_lora_weights": False, **options}
    model = tiny_model(architecture)
    return get_peft_model(model, LoraConfig(fan_in_fan_out=architecture == "gpt2", **options))


@pytest.fixture
def folders(tmp_path):
    """A base model, saved, and an adapter for it."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapted("llama", lora_dropout=0.3).save_pretrained(tmp_path / "adapter")
    return tmp_path


def configured(folders, **options):
    return ModelConfig(name_or_path=str(folders / "base"), adapter=str(folders / "adapter"), **options)


@pytest.mark.parametrize("architecture", list(MODULES))
def test_matches_batch_of_one_autograd(architecture):
    """Adapters, and the frozen weights under them."""
    base = double(adapted(architecture).get_base_model())
    assert not base.get_input_embeddings().weight.requires_grad
    rows = Rows.random(4)
    truth = copy.deepcopy(base).requires_grad_(True)
    stats, targets, _ = probe(copy.deepcopy(base), rows, kinds_of(base))
    assert "adapters" in stats
    assert_equal(stats, targets, truth, rows)


def test_a_configured_adapter_is_loaded_with_its_weights_and_alone_trains(folders):
    model = load_model(configured(folders), torch.float32, CPU)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    expected = adapted("llama").get_base_model().state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    truth = copy.deepcopy(model.double()).requires_grad_(True)
    stats, targets, _ = probe(model, Rows.random(3), ["adapters", "lm_head"])
    assert_equal(stats, targets, truth, Rows.random(3))


def test_targets_are_known_before_any_weight_is_loaded(folders):
    on_meta = resolve_targets(["adapters"], dissect(build_on_meta(configured(folders))))
    loaded = resolve_targets(["adapters"], dissect(load_model(configured(folders), torch.float32, CPU)))
    assert on_meta == loaded


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4bit", "8bit"])
def test_quantised_base(tmp_path, options):
    """Its own weights are refused by name; adapters and LM head are as autograd has them."""
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "plain")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**options)
    )
    quantised.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(quantised, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    config = configured(tmp_path)
    for wanted, message in (
        (["linear"], r"Linear(4|8)bit\w* is quantised, so its weight has no gradient; use the adapters"),
        ({"one": r".*layers\.0\.mlp\.up_proj\.weight"}, "is quantised"),
    ):
        for model in (build_on_meta(config), load_model(config, torch.float32, CPU)):
            with pytest.raises(ConfigError, match=message):
                resolve_targets(wanted, dissect(model))
    model = load_model(config, torch.float32, CPU)
    rows = Rows.random(3)
    stats, targets, _ = probe(model, rows, ["adapters", "norms", "embedding", "lm_head"])
    truth = load_model(config, torch.float32, CPU)
    for name, parameter in truth.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and "base_layer" not in name)
    # 4-bit weights multiply in float32, 8-bit ones round their inputs by the batch they are in.
    rtol = 1e-4 if "load_in_4bit" in options else 5e-2
    for i in range(3):
        gradients = autograd_gradients(truth, rows, i)
        for target, parameters in targets.members.items():
            expected = five([gradients[p] for p in parameters])
            for name in ("norm", "min", "max"):
                found = stats[target].norm() if name == "norm" else getattr(stats[target], name)
                assert found[i].item() == pytest.approx(expected[name], rel=rtol), (target, name)


def test_quantised_weights_cannot_be_sharded(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=options)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="is quantised, which ZeRO stage 3 cannot shard"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "base")), torch.float32, CPU, zero3={})


def test_a_damaged_or_foreign_adapter_is_named(folders):
    (folders / "empty").mkdir()
    other = folders / "other"
    adapted("gpt2").save_pretrained(other)
    for adapter in (folders / "empty", other, folders / "none"):
        config = ModelConfig(name_or_path=str(folders / "base"), adapter=str(adapter))
        for load in (build_on_meta, lambda config: load_model(config, torch.float32, CPU)):
            with pytest.raises(ConfigError, match=r"^model\.adapter: .*" + adapter.name) as caught:
                load(config)
            assert "\n" not in str(caught.value)


def test_an_adapter_is_no_model(folders):
    described = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(folders / "base")
    (folders / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"is an adapter; name its base model|no loadable causal"):
        load_model(ModelConfig(name_or_path=str(folders / "adapter")), torch.float32, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA has no rule"),
        ({"target_modules": [], "target_parameters": ["experts.down_proj"]}, "LoRA on a bare parameter"),
        ({"target_modules": ["embed_tokens"]}, "has no rule"),
    ],
)
def test_adapters_without_a_rule_are_refused_by_name(options, message):
    base = adapted("mixtral", **options).get_base_model()
    with pytest.raises(ConfigError, match=message):
        resolve_targets(["adapters"], dissect(base))


def test_adapters_that_take_no_part_are_refused_by_name():
    model = adapted("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=MODULES["llama"], init_lora_weights=False))
    anatomy = dissect(model.get_base_model())
    with pytest.raises(ConfigError, match=r"lora_A\.other\.weight, and adapter 'other' has no part"):
        resolve_targets(["adapters"], anatomy)
    assert resolve_targets({"used": r".*lora_.\.default\..*"}, anatomy).members["used"]
    model.merge_adapter()
    with pytest.raises(ConfigError, match="adapter 'default' has no part"):
        resolve_targets({"used": r".*lora_.\.default\..*"}, anatomy)
