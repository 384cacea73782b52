"""Every target's statistics equal those of a batch-of-one autograd loop in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import ARCHITECTURES, Rows, autograd_gradients, autograd_loss, five, tiny_model, untie

from grads_dist.model.anatomy import check_head, dissect
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.batches import collate
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.targets import TIED, resolve_targets

CPU = torch.device("cpu")
IN_FLOAT64 = ("GPT2", "OPT", "Falcon")
EXACT = 1e-9
"""float64 throughout: sums of up to 10^4 products at 1e-16 each, and room for cancellation."""
THROUGH_FLOAT32 = 5e-6
"""The other models form their norms (and some their softmax or rotations) in float32 whatever their type,
so that two float64 passes over different batches agree to about 1e-7 an operation."""


def double(model):
    """In float64, which transformers' grouped experts refuse."""
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model.double()


def probe(model, rows, wanted, weights=None, head_chunk_bytes=1 << 20, backward=True):
    """Statistics of all rows in one batch, with arbitrary weights on the losses."""
    anatomy = dissect(model)
    check_head(anatomy, CPU)
    targets = resolve_targets(wanted, anatomy)
    recorder = Recorder(anatomy, targets)
    probed = ProbedModel(anatomy, recorder, head_chunk_bytes)
    probed.fuse_head()
    count = len(rows.ids)
    batch = collate(rows, range(count), weights or [1 / count] * count, CPU, anatomy.head_counts)
    with recorder.batch(batch.layout):
        total = probed(batch, record=True)
        if backward and recorder.needs_backward:
            total.backward()
    return recorder.finish(probed.head_result), targets, probed


def expected(model, rows, i):
    """Autograd's gradients of every parameter, each use of a tied weight by itself and both together."""
    tied_model = autograd_gradients(model, rows, i)
    split_model = autograd_gradients(untie(copy.deepcopy(model)), rows, i)
    return {**split_model, TIED: tied_model[dissect(model).embedding_name + ".weight"]}


def assert_equal(stats, targets, model, rows):
    rtol = EXACT if type(model).__name__.startswith(IN_FLOAT64) else THROUGH_FLOAT32
    faults = []
    for i in range(len(rows.ids)):
        gradients = expected(model, rows, i)
        for target, parameters in targets.members.items():
            found, numel = stats[target], targets.numel[target]
            truth = five([gradients[p] for p in parameters])
            scale = {"sum": truth["norm"] * numel**0.5, "mean": truth["norm"] / numel**0.5}
            values = {
                **{k: getattr(found, k)[i].item() for k in ("sum", "sumsq", "min", "max")},
                "mean": found.mean(numel)[i].item(),
                "std": found.std(numel)[i].item(),
                "norm": found.norm()[i].item(),
            }
            for key, value in values.items():
                bound = rtol * max(abs(truth[key]), scale.get(key, 0.0), 1e-30)
                if not abs(value - truth[key]) <= bound:
                    faults.append(f"{target} row {i} {key}: {value!r} instead of {truth[key]!r}")
            assert found.nonfinite[i] == 0
    assert not faults, "\n".join(faults[:20])


def kinds_of(model):
    """Every kind of target that the model has, all at once."""
    anatomy = dissect(model)
    names = [p for p, _ in model.named_parameters()]
    optional = {
        "tied": anatomy.tied,
        "biases": any(p.endswith("bias") for p in names),
        "experts": any(".experts." in p for p in names),
        "adapters": any(".lora_" in p for p in names),
    }
    return ["embedding", "lm_head", "layers", "linear", "norms", *[k for k, has in optional.items() if has]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matches_batch_of_one_autograd(architecture):
    model = double(tiny_model(architecture))
    rows = Rows.random(5)
    weights = [0.3, 1.0, 2.5, 1e-3, 7.0]
    for wanted in (kinds_of(model), {"all": ".*"}):
        stats, targets, _ = probe(copy.deepcopy(model), rows, wanted, weights=weights)
        assert_equal(stats, targets, model, rows)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_tied_weight(architecture):
    model = tiny_model(architecture).double()
    rows = Rows.random(6)
    stats, targets, _ = probe(copy.deepcopy(model), rows, ["tied", "embedding", "lm_head"])
    assert_equal(stats, targets, model, rows)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [8 * VOCAB_BYTES for VOCAB_BYTES in (61, 3 * 61)])
def test_head_chunks_do_not_change_anything(architecture, chunk):
    """Chunks of 1 and 3 label positions: samples longer than a chunk are cut over the vocabulary."""
    model = tiny_model(architecture).double()
    rows = Rows.random(4, seed=3)
    wanted = ["lm_head", "embedding"] + (["tied"] if architecture == "gemma2" else [])
    stats, targets, _ = probe(copy.deepcopy(model), rows, wanted, head_chunk_bytes=chunk)
    assert_equal(stats, targets, model, rows)


def test_losses_and_total_gradient_equal_plain_training():
    model = tiny_model("gemma2").double()
    rows = Rows.random(5)
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    ours = copy.deepcopy(model)
    _, _, probed = probe(ours, rows, ["embedding", "lm_head", "tied"], weights)
    losses = torch.stack([autograd_loss(model, rows, i) for i in range(5)])
    (losses * torch.tensor(weights)).sum().backward()
    torch.testing.assert_close(probed.head_result.losses, losses.detach(), rtol=THROUGH_FLOAT32, atol=0)
    for (name, p), q in zip(model.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(
            q.grad, p.grad, rtol=THROUGH_FLOAT32, atol=THROUGH_FLOAT32, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_el2n():
    model = tiny_model("llama").double()
    rows = Rows.random(4)
    _, _, probed = probe(copy.deepcopy(model), rows, ["lm_head"])
    for i in range(4):
        ids, mask = torch.from_numpy(rows.ids[i]).long(), torch.from_numpy(rows.masks[i])
        p = model(input_ids=ids[None]).logits[0, :-1].softmax(-1)[mask[1:]]
        error = p - torch.nn.functional.one_hot(ids[1:][mask[1:]], 61)
        assert probed.head_result.el2n[i].item() == pytest.approx(
            error.norm(dim=1).mean().item(), rel=THROUGH_FLOAT32
        )


def test_frozen_weights_give_the_same_and_lm_head_needs_no_backward():
    model = tiny_model("llama").double()
    rows = Rows.random(4)
    frozen = copy.deepcopy(model).requires_grad_(False)
    stats, targets, _ = probe(frozen, rows, ["embedding", "layers", "lm_head"])
    assert_equal(stats, targets, model, rows)
    with torch.no_grad():
        stats, targets, _ = probe(copy.deepcopy(model), rows, ["lm_head"], backward=False)
    assert_equal(stats, targets, model, rows)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing(reentrant, frozen):
    model = tiny_model("qwen2").double()
    rows = Rows.random(4)
    ours = copy.deepcopy(model).train().requires_grad_(not frozen)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    stats, targets, _ = probe(ours, rows, ["embedding", "layers", "lm_head"])
    assert_equal(stats, targets, model, rows)


def test_head_with_bias():
    model = tiny_model("llama").double()
    model.lm_head = torch.nn.Linear(16, 61).double()
    rows = Rows.random(4)
    stats, targets, _ = probe(copy.deepcopy(model), rows, ["lm_head"])
    assert len(targets.members["lm_head"]) == 2
    assert_equal(stats, targets, model, rows)
