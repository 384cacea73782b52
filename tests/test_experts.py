"""Mixtures of experts: fused weights and lists of modules, routers, tokens that no expert shares."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from listed_moe import ListedExperts
from test_oracle import assert_equal, double, probe
from tiny import Rows, tiny_model
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import dissect
from grads_dist.stats.experts import IMPLEMENTATION
from grads_dist.stats.layers import LayerReader
from grads_dist.stats.routed import source_rows
from grads_dist.stats.segments import BatchLayout
from grads_dist.stats.targets import resolve_targets

WANTED = ["experts", "layers", "lm_head", "embedding"]


def listed(dispatch: str = "index") -> nn.Module:
    model = tiny_model("llama")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = ListedExperts(16, 24, dispatch)
    return model.double()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing(architecture, reentrant, frozen):
    model = double(tiny_model(architecture))
    rows = Rows.random(4)
    ours = copy.deepcopy(model).requires_grad_(not frozen)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    stats, targets, _ = probe(ours, rows, WANTED)
    assert_equal(stats, targets, model, rows)


@pytest.mark.parametrize("dispatch", ["index", "row", "index_select", "mask", "keyword"])
@pytest.mark.parametrize("frozen", [False, True])
def test_listed_experts(dispatch, frozen):
    model = listed(dispatch)
    rows = Rows.random(5, seed=2)
    stats, targets, _ = probe(copy.deepcopy(model).requires_grad_(not frozen), rows, WANTED)
    assert "experts.1" in targets.members
    assert_equal(stats, targets, model, rows)


@pytest.mark.parametrize("reentrant", [False, True])
def test_listed_experts_under_checkpointing(reentrant):
    model = listed()
    rows = Rows.random(4)
    ours = copy.deepcopy(model)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    stats, targets, _ = probe(ours, rows, WANTED)
    assert_equal(stats, targets, model, rows)


def test_an_expert_without_tokens_has_a_zero_gradient():
    """One short row: most of the experts see nothing."""
    rows = Rows.random(1, longest=2)
    for model in (listed(), double(tiny_model("qwen3_moe", num_experts=16))):
        wanted = {f"expert{i}": rf".*layers\.0\.mlp\.experts\.{i}\..*" for i in range(4)}
        if hasattr(model.config, "num_experts"):
            wanted = ["experts"]
        stats, targets, _ = probe(copy.deepcopy(model), rows, wanted)
        assert_equal(stats, targets, model, rows)
        if isinstance(wanted, dict):
            assert 0.0 in [found.norm().item() for found in stats.values()]


@pytest.mark.parametrize("dispatch", ["matrix", "repeat"])
def test_a_dispatch_that_cannot_be_followed_is_refused_by_name(dispatch):
    with pytest.raises(ConfigError, match=r"model\.layers\.\d\.mlp\.experts\.\d gets its tokens in a way"):
        probe(listed(dispatch), Rows.random(3), ["experts"])


def test_nothing_of_a_pass_is_kept_behind_it():
    def hidden_states() -> int:
        gc.collect()
        return sum(isinstance(x, Tensor) and x.shape == (2, 6, 16) for x in gc.get_objects())

    model, before = listed(), hidden_states()
    reader = LayerReader(model, ["model.layers.0.mlp.experts.0.0.weight"], lambda *_: None)
    with reader.batch(BatchLayout((6, 6), 6)):
        model(input_ids=torch.arange(12).view(2, 6)).logits.sum().backward()
    assert hidden_states() == before
    reader.detach()


def test_where_experts_see_all_tokens_they_are_ordinary_layers():
    class Dense(ListedExperts):
        def forward(self, hidden: Tensor) -> Tensor:
            weights = self.gate(hidden).softmax(-1)
            return sum(expert(hidden) * weights[..., i, None] for i, expert in enumerate(self.experts))

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Dense(16, 24)
    model.double()
    rows = Rows.random(4)
    stats, targets, _ = probe(copy.deepcopy(model), rows, ["experts"])
    assert_equal(stats, targets, model, rows)


def test_source_rows_are_checked_against_the_values():
    """The graph of (2 x)[i] shows an index, but its rows are not those of x."""
    x = torch.randn(6, 3, requires_grad=True)
    index = torch.tensor([4, 1, 1])
    assert source_rows(x[index], x).tolist() == [4, 1, 1]
    assert source_rows((2 * x)[index], x) is None
    assert source_rows(x, x) is None
    assert source_rows(x.detach()[index], x) is None


def test_expert_parallelism_is_refused_by_name():
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ConfigError, match="MixtralExperts spreads its experts over ranks"):
        resolve_targets(["experts"], dissect(model))


def test_reading_ends_with_the_reader():
    """The implementation of the experts' computation is the model's own again."""
    model = tiny_model("mixtral")
    before = model.config._experts_implementation
    ids = torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).logits
    found = []
    experts = "model.layers.1.mlp.experts.down_proj"
    reader = LayerReader(
        model, [experts, "model.layers.1.mlp.gate.weight"], lambda name, _: found.append(name)
    )
    assert model.config._experts_implementation == IMPLEMENTATION
    with reader.batch(BatchLayout((6, 6), 6)):
        output = model(input_ids=ids).logits
        output.sum().backward()
    assert sorted(found) == [experts, "model.layers.1.mlp.gate.weight"]
    torch.testing.assert_close(output, expected)
    reader.detach()
    assert model.config._experts_implementation == before
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert not model.model.layers[1].mlp.gate._forward_hooks and "forward" not in vars(
        model.model.layers[1].mlp.gate
    )
