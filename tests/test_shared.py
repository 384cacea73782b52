"""Weight gradients summed from the products of the statistics are those of plain training."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_oracle import EXACT, THROUGH_FLOAT32, assert_equal, double, kinds_of, probe
from tiny import Rows, autograd_loss, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from grads_dist.errors import ConfigError
from grads_dist.stats.layers import LayerReader
from grads_dist.stats.segments import BatchLayout
from grads_dist.stats.shared import _SharedLinear

WEIGHTS = [0.1, 0.2, 0.3, 0.15, 0.25]


def assert_same_gradients(ours, model, bound=THROUGH_FLOAT32):
    names = [name for name, _ in model.named_parameters()]
    faults = []
    for name, p, q in zip(names, model.parameters(), ours.parameters(), strict=True):
        if p.grad is None and q.grad is None:
            continue
        error = (q.grad - p.grad).abs().max().item()
        # A bias of keys has no gradient but for rounding: softmax does not see it.
        if not error <= bound * max(p.grad.abs().max().item(), 1e-9):
            faults.append(f"{name}: {error:.3g} of {p.grad.abs().max().item():.3g}")
    assert not faults, "\n".join(faults[:10])


def plain_backward(model, rows):
    model.zero_grad()
    losses = torch.stack([autograd_loss(model, rows, i) for i in range(len(WEIGHTS))])
    (losses * torch.tensor(WEIGHTS)).sum().backward()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "mixtral", "opt", "falcon"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "nonreentrant", "reentrant"])
def test_gradients_of_all_weights(architecture, checkpointing):
    model = double(tiny_model(architecture))
    rows = Rows.random(5)
    ours = copy.deepcopy(model)
    if checkpointing is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            ours.enable_input_require_grads()
    stats, targets, _ = probe(ours, rows, kinds_of(model), WEIGHTS)
    assert_equal(stats, targets, model, rows)
    plain_backward(model, rows)
    assert_same_gradients(ours, model)


def test_float32_with_the_kernels():
    model = tiny_model("llama")
    rows = Rows.random(5)
    ours = copy.deepcopy(model)
    probe(ours, rows, ["linear", "lm_head"], WEIGHTS)
    plain_backward(model, rows)
    assert_same_gradients(ours, model)


def test_adapters_alone_get_gradients():
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    ).get_base_model()
    model.double()
    rows = Rows.random(5)
    ours = copy.deepcopy(model)
    probe(ours, rows, ["adapters", "linear"], WEIGHTS)
    plain_backward(model, rows)
    assert_same_gradients(ours, model)
    assert ours.model.layers[0].mlp.up_proj.weight.grad is None


class Seen:
    """A reader of a small network's linear layers that counts how their gradients were made."""

    def __init__(self, model, consume=lambda name, gradient: gradient.statistics()):
        self.names: list[str] = []

        def taken(name, gradient):
            self.names.append(name)
            consume(name, gradient)

        parameters = [name for name, _ in model.named_parameters()]
        self.reader = LayerReader(model, parameters, taken, share=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), Conv1D(3, 7))


def backward(model, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().sum()
    loss.backward()


def test_the_product_is_shared(monkeypatch):
    """Not formed a second time by autograd."""
    model, x = network(), torch.randn(2, 4, 5)
    seen = Seen(model)
    calls = []
    monkeypatch.setattr(
        _SharedLinear,
        "backward",
        staticmethod(lambda ctx, g, f=_SharedLinear.backward: calls.append(1) or f(ctx, g)),
    )
    with seen.reader.batch(BatchLayout((4, 4), 4)):
        backward(model, x)
    assert len(calls) == 2 and sorted(seen.names) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_without_statistics_the_gradient_comes_all_the_same():
    """A consumer may take a sketch, or nothing."""
    model, x = network(), torch.randn(2, 4, 5)
    expected = copy.deepcopy(model)
    backward(expected, x)
    seen = Seen(model, lambda name, gradient: None)
    with seen.reader.batch(BatchLayout((4, 4), 4)):
        backward(model, x)
    assert len(seen.names) == 4
    assert_same_gradients(model, expected)


def test_two_readings_of_one_gradient_add_it_once():
    model, x = network().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)
    backward(expected, x)
    seen = Seen(model, lambda name, gradient: [gradient.statistics() for _ in range(2)])
    with seen.reader.batch(BatchLayout((4, 4), 4)):
        backward(model, x)
    assert_same_gradients(model, expected, EXACT)


def test_padding_has_no_part_in_it():
    """Its gradient is zero, and what stands at padded positions may be anything."""
    model, x = network().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)
    expected(x)[:, :3].square().sum().backward()
    seen = Seen(model)
    with seen.reader.batch(BatchLayout((3, 3), 4)):
        model(x)[:, :3].square().sum().backward()
    assert_same_gradients(model, expected, EXACT)


def test_autocast():
    """Inputs in float32, products in bfloat16: no further from float32 than plain autocast is, twice over."""
    model, x = network(), torch.randn(6, 8, 5)
    exact, plain = copy.deepcopy(model), copy.deepcopy(model)
    backward(exact, x)
    backward(plain, x, autocast=True)
    seen = Seen(model)
    with seen.reader.batch(BatchLayout((8,) * 6, 8)):
        backward(model, x, autocast=True)
    for p, q, r in zip(exact.parameters(), plain.parameters(), model.parameters(), strict=True):
        assert r.grad.dtype == p.grad.dtype
        assert (r.grad - p.grad).abs().max() <= 2 * (q.grad - p.grad).abs().max() + 1e-3 * p.grad.abs().max()


def test_outside_a_batch_and_after_detaching_the_layers_are_their_own():
    model, x = network(), torch.randn(2, 4, 5)
    expected = copy.deepcopy(model)
    seen = Seen(model)
    backward(model, x)
    backward(expected, x)
    assert not seen.names
    seen.reader.detach()
    assert all("forward" not in vars(module) for module in model)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_weights_frozen_later_are_still_read():
    """As after the warmup of a probe."""
    model, x = network().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    found = {}
    seen = Seen(model, lambda name, gradient: found.setdefault(name, []).append(gradient.statistics()))
    for _ in range(2):
        with seen.reader.batch(BatchLayout((4, 4), 4)):
            backward(model, x)
        model.requires_grad_(False)
    for name, (before, after) in found.items():
        torch.testing.assert_close(before.sumsq, after.sumsq, msg=name)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_forward_pass_of_a_layers_own_stays(factor):
    """Training goes on with it; what it computes must be known to be read."""
    model, x = network().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)
    for net in (model, expected):
        net[0].forward = lambda y, layer=net[0]: factor * nn.functional.linear(y, layer.weight, layer.bias)
    backward(expected, x)
    seen = Seen(model)
    with seen.reader.batch(BatchLayout((4, 4), 4)):
        if factor != 1:
            with pytest.raises(ConfigError, match=r"0 \(Linear\) does not compute what"):
                backward(model, x)
            return
        backward(model, x)
    assert "0.weight" in seen.names
    assert_same_gradients(model, expected, EXACT)
