"""From names and patterns to parameters; what has no rule is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import Rows, tiny_llava, tiny_model
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import dissect
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.batches import collate
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.rules import rule_for
from grads_dist.stats.targets import TIED, resolve_targets


def resolve(model: nn.Module, wanted):
    return resolve_targets(wanted, dissect(model))


@pytest.fixture
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def gpt2() -> nn.Module:
    return tiny_model("gpt2")


def test_embedding_and_head(llama):
    targets = resolve(llama, ["embedding", "lm_head"])
    assert targets.members == {"embedding": ("model.embed_tokens.weight",), "lm_head": ("lm_head.weight",)}
    assert targets.numel == {"embedding": 61 * 16, "lm_head": 61 * 16}


def test_layers_hold_all_their_parameters(llama):
    targets = resolve(llama, ["layers"])
    assert list(targets.members) == ["layers.0", "layers.1"]
    for i in (0, 1):
        prefix = f"model.layers.{i}."
        expected = {name: p.numel() for name, p in llama.named_parameters() if name.startswith(prefix)}
        assert set(targets.members[f"layers.{i}"]) == set(expected)
        assert targets.numel[f"layers.{i}"] == sum(expected.values())


@pytest.mark.parametrize(("architecture", "per_layer"), [("llama", 7), ("gpt2", 4)])
def test_linear_is_every_linear_module_but_the_head(architecture, per_layer):
    targets = resolve(tiny_model(architecture), ["linear"])
    assert len(targets.members) == 2 * per_layer
    assert not any("lm_head" in name for name in targets.members)


def test_a_pattern_matches_whole_names(llama):
    targets = resolve(llama, {"q": r".*q_proj\.weight", "one": r"model\.norm\.weight"})
    assert len(targets.members["q"]) == 2
    assert targets.members["one"] == ("model.norm.weight",)
    with pytest.raises(ConfigError, match="matches no parameter"):
        resolve(llama, {"part": "q_proj"})


def test_a_tied_weight_enters_a_pattern_once(gpt2):
    targets = resolve(gpt2, {"all": ".*"})
    assert targets.members["all"].count(TIED) == 1
    assert not {"transformer.wte.weight", "lm_head.weight"} & set(targets.members["all"])
    assert targets.numel["all"] == sum(p.numel() for p in gpt2.parameters())


def test_either_use_of_a_tied_weight_can_be_asked_for_alone(gpt2):
    targets = resolve(gpt2, ["embedding", "lm_head", "tied"])
    assert targets.members["tied"] == (TIED,)
    assert len(set(targets.numel.values())) == 1


def test_all_of_an_untied_model(llama):
    assert set(resolve(llama, {"all": ".*"}).members["all"]) == {name for name, _ in llama.named_parameters()}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["heads"], "'heads' is not known; allowed: embedding, lm_head, tied, layers, linear"),
        (["tied"], "'tied' needs a model whose embedding and LM head share one weight"),
        ({"a": "("}, r"probe.targets.a: '(' is not a regular expression"),
        ({"a": "nothing"}, "'nothing' matches no parameter; names look like 'model.embed_tokens.weight'"),
    ],
)
def test_what_cannot_be_resolved_is_named(llama, wanted, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(llama, wanted)


class Scale(nn.Module):
    """A layer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Adapted(nn.Linear):
    """A linear layer that does something else than a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


@pytest.mark.parametrize(
    "layer", [Scale(), Adapted(16, 24), nn.Conv1d(16, 24, 1)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("wanted", [["layers"], {"all": ".*"}], ids=["layers", "pattern"])
def test_a_layer_without_a_rule_is_refused_by_name(llama, layer, wanted):
    llama.model.layers[1].mlp.gate_proj = layer
    with pytest.raises(
        ConfigError, match=rf"model\.layers\.1\.mlp\.gate_proj.*{type(layer).__name__} has no rule"
    ):
        resolve(llama, wanted)


def test_a_layer_without_a_rule_is_no_obstacle_where_it_is_no_target(llama):
    llama.model.layers[1].mlp.gate_proj = Adapted(16, 24)
    assert "layer0" in resolve(llama, {"layer0": r"model\.layers\.0\..*"}).members


def test_a_subclass_of_linear_is_refused_as_linear_target(llama):
    """Never skipped silently."""
    llama.model.layers[1].mlp.gate_proj = Adapted(16, 24)
    with pytest.raises(ConfigError, match="Adapted has no rule"):
        resolve(llama, ["linear"])


def test_a_parameter_on_its_own_is_refused(llama):
    llama.model.layers[0].gate = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.gate"):
        resolve(llama, ["layers"])


def test_a_module_under_two_names_is_refused(llama):
    llama.model.layers[1].mlp.up_proj = llama.model.layers[0].mlp.up_proj
    with pytest.raises(ConfigError, match=r"up_proj\.weight, which several layers share"):
        resolve(llama, ["layers"])


def test_a_weight_of_two_modules_is_refused(llama):
    llama.model.layers[1].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError, match=r"up_proj\.weight, which several layers share"):
        resolve(llama, ["linear"])


def backward(model: nn.Module, wanted) -> None:
    anatomy = dissect(model)
    recorder = Recorder(anatomy, resolve_targets(wanted, anatomy))
    probed = ProbedModel(anatomy, recorder, 1 << 20)
    probed.fuse_head()
    batch = collate(Rows.random(3), range(3), [1.0] * 3, torch.device("cpu"))
    with recorder.batch(batch.layout):
        probed(batch, record=True).backward()
    recorder.finish(probed.head_result)


def test_a_module_used_twice_in_a_pass_is_refused(llama):
    mlp = llama.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x)) + mlp.down_proj(mlp.gate_proj(x))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.down_proj is used more than once"):
        backward(llama, ["layers"])


def test_a_module_that_no_gradient_reaches_is_named(llama):
    mlp = llama.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))
    with pytest.raises(ConfigError, match=r"no gradient reached model\.layers\.0\.mlp\.gate_proj"):
        backward(llama, ["layers"])


class SomeRMSNorm(nn.Module):
    """Normalises each of `groups` parts by itself, as some models' norms do in some places."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.eps, self.groups = 1e-6, groups
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return (parts * scale).flatten(-2) * self.weight


def test_a_class_known_by_name_is_checked_in_every_place(llama):
    for layer in llama.model.layers:
        layer.input_layernorm = SomeRMSNorm(16, 1)
    backward(llama, {"norms": r".*input_layernorm\..*"})
    llama.model.layers[1].input_layernorm.groups = 2
    with pytest.raises(
        ConfigError, match=r"layers\.1\.input_layernorm \(SomeRMSNorm\) does not compute what"
    ):
        backward(llama, {"norms": r".*input_layernorm\..*"})


def test_a_layer_norm_over_several_axes_has_no_rule():
    assert rule_for(nn.LayerNorm(4), "weight") is not None
    assert rule_for(nn.LayerNorm((3, 4)), "weight") is None


def test_the_layers_are_those_of_the_text():
    """An image encoder may come first, with as many."""
    model = tiny_llava()
    targets = resolve(model, ["layers"])
    assert targets.members["layers.0"][0].startswith("model.language_model.layers.0.")
    for wanted in (["linear"], {"images": r".*vision_tower.*fc1.*"}, {"bridge": r".*projector.*"}):
        with pytest.raises(ConfigError, match=r"outside model\.language_model reads no tokens"):
            resolve(model, wanted)
