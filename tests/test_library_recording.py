"""`record` around other people's passes: the oracle, factors that are undone, and what is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from library_cases import batch_of, check, gradients_of
from tiny import Rows, autograd_loss, five, tiny_llava, tiny_model
from torch import nn
from transformers import LlamaForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

import grads_dist
from grads_dist.errors import ConfigError

EXACT = 1e-9
"""float64 throughout."""
THROUGH_FLOAT32 = 5e-6
"""transformers forms a model's own loss in float32 whatever its type, and most models their norms."""
KINDS = {
    "llama": ["embedding", "lm_head", "layers", "linear", "norms"],
    "gpt2": ["embedding", "lm_head", "tied", "layers", "norms", "biases"],
    "gemma2": ["embedding", "lm_head", "tied", "linear", "norms"],
}


def model_of(architecture: str) -> nn.Module:
    # A padded query whose sliding window holds nothing but padding is NaN in the model itself.
    wide = {"sliding_window": 64} if architecture == "gemma2" else {}
    return tiny_model(architecture, **wide).double()


def oracle(model: nn.Module, rows: Rows) -> list[dict]:
    return [gradients_of(copy.deepcopy(model), rows, i) for i in range(len(rows.ids))]


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every row over its labels, in the type of the logits."""
    targets = labels[:, 1:]
    per_token = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    carries = targets != -100
    return (per_token * carries).sum(1) / carries.sum(1)


# Gemma-2 itself makes NaN of padding on the left in float64: its mask is the smallest double.
LEFT = [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("gemma2", False)]


@pytest.mark.parametrize("architecture, left", LEFT)
def test_models_own_loss(architecture, left):
    model, rows = model_of(architecture), Rows.random(5)
    ours = copy.deepcopy(model)
    with grads_dist.record(ours, KINDS[architecture]) as recording:
        (1e3 * ours(**batch_of(rows, left=left)).loss).backward()
    check(recording.statistics(), recording.targets, oracle(model, rows), THROUGH_FLOAT32)
    losses = torch.stack([autograd_loss(model, rows, i) for i in range(5)])
    torch.testing.assert_close(recording.loss, losses, rtol=THROUGH_FLOAT32, atol=0)
    labels = torch.tensor([int(mask.sum()) for mask in rows.masks])
    assert recording.num_label_tokens.tolist() == labels.tolist()
    factors = 1e3 * labels.double() / labels.sum()
    torch.testing.assert_close(recording.factors, factors, rtol=1e-6, atol=0)


@pytest.mark.parametrize("left", [False, True])
def test_users_own_loss(left):
    """Losses made of the logits, in float64, with weights of the user's and a loss scale on top."""
    model, rows = model_of("gpt2"), Rows.random(4)
    batch, weights = batch_of(rows, left=left), torch.tensor([0.3, 2.0, 1e-3, 7.0]).double()
    labels = batch.pop("labels")
    ours = copy.deepcopy(model)
    with grads_dist.record(ours, KINDS["gpt2"]) as recording:
        losses = recording.sample_losses(row_losses(ours(**batch).logits, labels))
        (1024 * (losses * weights).sum()).backward()
    check(recording.statistics(), recording.targets, oracle(model, rows), EXACT)
    torch.testing.assert_close(recording.factors, 1024 * weights)
    assert recording.loss is None and recording.el2n is None


def test_weights_and_gradients_as_they_are():
    model, rows = model_of("gpt2"), Rows.random(3)
    batch, weights = batch_of(rows), torch.tensor([0.5, 2.0, 1.0]).double()
    labels = batch.pop("labels")
    with grads_dist.record(copied := copy.deepcopy(model), ["embedding", "tied", "lm_head"]) as recording:
        (row_losses(copied(**batch).logits, labels) * weights).sum().backward()
    truth = oracle(model, rows)
    check(recording.statistics(weights=weights), recording.targets, truth, EXACT)
    assert recording.factors is None
    weighted = [{n: g * w for n, g in by_name.items()} for by_name, w in zip(truth, weights, strict=True)]
    check(recording.statistics(), recording.targets, weighted, EXACT)


def test_num_items_in_batch_and_accumulation():
    """Several micro-batches in one block, each divided by the labels of all, as the Trainer has it."""
    model, rows = model_of("llama"), Rows.random(6)
    ours, total = copy.deepcopy(model), torch.tensor(int(sum(mask.sum() for mask in rows.masks)))
    truth = oracle(model, rows)
    with grads_dist.record(ours, ["embedding", "lm_head", "layers"]) as recording:
        for chosen in ([0, 1], [2, 3, 4], [5]):
            ours(**batch_of(rows, chosen), num_items_in_batch=total).loss.backward()
            assert recording.num_samples == len(chosen)
            check(recording.statistics(), recording.targets, [truth[i] for i in chosen], THROUGH_FLOAT32)
            with torch.no_grad():
                ours(**batch_of(rows, [0]))
            assert recording.num_samples == len(chosen)
    whole = copy.deepcopy(model)
    whole(**batch_of(rows)).loss.backward()
    for ours_p, whole_p in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, whole_p.grad, rtol=1e-5, atol=1e-6)


def test_el2n():
    model, rows = model_of("llama"), Rows.random(3)
    with grads_dist.record(model, ["lm_head"]) as recording:
        model(**batch_of(rows)).loss.backward()
    for i in range(3):
        ids, mask = torch.from_numpy(rows.ids[i]).long(), torch.from_numpy(rows.masks[i])
        p = model(input_ids=ids[None]).logits[0, :-1].softmax(-1)[mask[1:]]
        error = (p - nn.functional.one_hot(ids[1:][mask[1:]], 61)).norm(dim=1).mean()
        assert recording.el2n[i].item() == pytest.approx(error.item(), rel=THROUGH_FLOAT32)


def test_a_sample_without_labels_has_a_gradient_of_zero():
    model, rows = model_of("llama"), Rows.random(3)
    batch = batch_of(rows)
    batch["labels"][1] = -100
    with grads_dist.record(ours := copy.deepcopy(model), ["embedding", "lm_head", "layers"]) as recording:
        ours(**batch).loss.backward()
    stats = recording.statistics()
    assert all(found.sumsq[1] == 0 and found.max[1] == 0 for found in stats.values())
    truth = oracle(model, rows)
    truth[1] = {name: torch.zeros_like(g) for name, g in truth[1].items()}
    check(stats, recording.targets, truth, THROUGH_FLOAT32)


def test_mixture_of_experts():
    model, rows = model_of("mixtral"), Rows.random(4)
    model.config._experts_implementation = "eager"
    ours = copy.deepcopy(model)
    with grads_dist.record(ours, ["experts", "lm_head"]) as recording:
        ours(**batch_of(rows)).loss.backward()
    check(recording.statistics(), recording.targets, oracle(model, rows), THROUGH_FLOAT32)
    assert ours.config._experts_implementation == "eager"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, rows = model_of("qwen2"), Rows.random(4)
    ours = copy.deepcopy(model).train()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    with grads_dist.record(ours, ["embedding", "lm_head", "layers"]) as recording:
        ours(**batch_of(rows)).loss.backward()
    check(recording.statistics(), recording.targets, oracle(model, rows), THROUGH_FLOAT32)


def test_bfloat16_autocast():
    """The numbers are those of the pass as it ran: near the exact ones, and equal for equal rows."""
    model, rows = tiny_model("llama"), Rows.random(4)
    twice = Rows(rows.ids[:1] * 2 + rows.ids, rows.masks[:1] * 2 + rows.masks)
    with grads_dist.record(model, ["embedding", "lm_head", "layers"]) as recording:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch_of(twice)).loss
        loss.backward()
    truth = oracle(model.double(), twice)
    for target, found in recording.statistics().items():
        norms = [five([g[name] for name in recording.targets.members[target]])["norm"] for g in truth]
        torch.testing.assert_close(found.norm(), torch.tensor(norms).double(), rtol=0.05, atol=0)
        assert found.norm()[0] == pytest.approx(found.norm()[1].item(), rel=1e-3)


class Bag(nn.Module):
    """Not a language model: ids [S, T], a mean over them, two layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.table(ids).mean(1))


def test_any_module():
    torch.manual_seed(0)
    model, ids, labels = Bag().double(), torch.randint(0, 11, (4, 5)), torch.tensor([0, 2, 1, 1])
    targets = {"table": "table.*", "first": r"body\.0\..*", "all": ".*"}

    def losses(outputs: torch.Tensor, rows: slice) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, labels[rows], reduction="none")

    with grads_dist.record(model, targets) as recording:
        recording.sample_losses(losses(model(ids), slice(None))).mean().backward()
    truth = []
    for i in range(4):
        model.zero_grad()
        losses(model(ids[i : i + 1]), slice(i, i + 1)).sum().backward()
        truth.append({name: p.grad.clone() for name, p in model.named_parameters()})
    check(recording.statistics(), recording.targets, truth, EXACT)
    with grads_dist.record(model, ["linear", "norms", "biases"]) as recording:
        losses(model(ids), slice(None)).mean().backward()
    check(recording.statistics(weights=[0.25] * 4), recording.targets, truth, EXACT)


def test_a_transformers_model_that_is_no_language_model():
    """Its loss is not the mean over label tokens, so only the user knows each sample's."""
    body = tiny_model("llama")
    torch.manual_seed(0)
    body.config.num_labels, body.config.pad_token_id = 3, 60
    model = LlamaForSequenceClassification(body.config).double()
    rows, labels = Rows.random(3), torch.tensor([0, 2, 1])
    batch = batch_of(rows)
    batch = {"input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 60)}
    targets = {"embedding": ".*embed_tokens.*", "score": "score.*", "layer": r"model\.layers\.0\..*"}
    with grads_dist.record(model, targets) as recording:
        model(**batch, labels=labels).loss.backward()
    truth = []
    for i in range(3):
        model.zero_grad()
        ids = torch.from_numpy(rows.ids[i]).long()[None]
        model(input_ids=ids, labels=labels[i : i + 1]).loss.backward()
        truth.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert recording.factors is None
    check(recording.statistics(weights=[1 / 3] * 3), recording.targets, truth, THROUGH_FLOAT32)


def state_of(model: nn.Module) -> list:
    """Everything of a model that reading may touch, but its weights."""
    return [
        (name, "forward" in vars(m), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]


def test_the_model_is_left_as_it_was():
    model, rows = tiny_model("gpt_oss"), Rows.random(2)
    before = state_of(model)
    with grads_dist.record(model, ["embedding", "lm_head", "experts"]) as recording:
        assert state_of(model) != before
        model(**batch_of(rows)).loss.backward()
    assert state_of(model) == before
    first = recording.statistics()["lm_head"].sumsq
    model(**batch_of(Rows.random(3, seed=5))).loss.backward()
    assert torch.equal(recording.statistics()["lm_head"].sumsq, first)
    with pytest.raises(RuntimeError, match="user"), grads_dist.record(model):
        raise RuntimeError("user")
    assert state_of(model) == before


def test_reading_does_not_change_the_training():
    plain, rows = tiny_model("llama"), Rows.random(4)
    read = copy.deepcopy(plain)
    plain(**batch_of(rows)).loss.backward()
    with grads_dist.record(read, ["embedding", "lm_head", "linear", "norms"]):
        read(**batch_of(rows)).loss.backward()
    for p, q in zip(plain.parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7)


def test_frozen_weights():
    model, rows = model_of("llama"), Rows.random(3)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with grads_dist.record(frozen, ["embedding", "lm_head", "layers"]) as recording:
        frozen(**batch_of(rows)).loss.backward()
    check(recording.statistics(), recording.targets, oracle(model, rows), THROUGH_FLOAT32)
    assert all(p.grad is None for p in frozen.parameters())


def test_one_pass_at_a_time():
    model, rows = tiny_model("llama"), Rows.random(4)
    with grads_dist.record(model) as recording:
        with pytest.raises(ConfigError, match="no forward pass"):
            recording.statistics()
        first = model(**batch_of(rows, [0, 1])).loss
        with pytest.raises(ConfigError, match="no backward pass"):
            recording.statistics()
        model(**batch_of(rows, [2, 3]))
        with pytest.raises(ConfigError, match="not the last"):
            first.backward()


def test_losses_must_be_one_a_sample():
    model, rows = tiny_model("llama"), Rows.random(3)
    with grads_dist.record(model) as recording:
        loss = model(**batch_of(rows)).loss
        with pytest.raises(ConfigError, match=r"sample_losses: shape \(\); allowed: \(3,\)"):
            recording.sample_losses(loss)


def fused(model: nn.Module, batch: dict, targets: list[str], power: float = 1.0) -> grads_dist.Recording:
    """A pass through TRL's LM head, as SFTTrainer makes it; `power` other than 1 is another loss."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    with grads_dist.record(model, targets) as recording:
        output = model(**batch, fused_lm_head=True, use_cache=False)
        (3 * (-output.log_probs).pow(power).sum() / 100).backward()
    return recording


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_fused_lm_head(architecture):
    """gpt2 and gemma2: tied weights, and logits that are capped."""
    model, rows = model_of(architecture), Rows.random(4)
    targets = ["embedding", "lm_head", "tied", "layers"]
    recording = fused(copy.deepcopy(model), batch_of(rows), targets)
    check(recording.statistics(), recording.targets, oracle(model, rows), THROUGH_FLOAT32)
    labels = torch.tensor([mask.sum() for mask in rows.masks]).double()
    torch.testing.assert_close(recording.factors, 3 * labels / 100, rtol=1e-6, atol=0)
    losses = torch.stack([autograd_loss(model, rows, i) for i in range(4)])
    torch.testing.assert_close(recording.loss, losses, rtol=THROUGH_FLOAT32, atol=0)


def test_fused_lm_head_and_a_sample_without_labels():
    model, rows = model_of("gpt2"), Rows.random(3)
    batch = batch_of(rows)
    batch["labels"][1] = -100
    recording = fused(copy.deepcopy(model), batch, ["embedding", "lm_head", "tied"])
    truth = oracle(model, rows)
    truth[1] = {name: torch.zeros_like(g) for name, g in truth[1].items()}
    check(recording.statistics(), recording.targets, truth, THROUGH_FLOAT32)
    assert recording.loss[1].isnan() and recording.el2n[1].isnan()


def test_fused_lm_head_with_another_loss():
    """As TRL's `dft` loss does, it weighs the tokens of a sample differently."""
    with pytest.raises(ConfigError, match="tokens of a sample have different weights"):
        fused(tiny_model("llama"), batch_of(Rows.random(3)), ["lm_head"], power=2.0)


def test_images_belong_to_whose_tokens_they_are():
    """Two in the first row, none in the second: as many as there are samples."""
    model = tiny_llava().double()
    ids = torch.arange(42).view(3, 14) + 3
    ids[0, 1:9], ids[2, 1:5] = 60, 60
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 60, -100)}
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with grads_dist.record(model, ["embedding", "lm_head", "layers"]) as recording:
        model(**batch, pixel_values=images).loss.backward()
    oracle = []
    for i, own in enumerate((images[:2], None, images[2:])):
        model.zero_grad()
        model(**{name: x[i : i + 1] for name, x in batch.items()}, pixel_values=own).loss.backward()
        oracle.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    check(recording.statistics(), recording.targets, oracle, THROUGH_FLOAT32)


def test_one_recording_inside_another():
    model, rows = tiny_model("mixtral"), Rows.random(3)
    model.config._experts_implementation = "eager"
    kinds = ["layers", "experts", "lm_head"]
    with grads_dist.record(model, kinds) as outer, grads_dist.record(model, kinds) as inner:
        model(**batch_of(rows)).loss.backward()
    first, second = outer.statistics(), inner.statistics()
    for target in first:
        assert torch.equal(first[target].sumsq, second[target].sumsq), target
    assert model.config._experts_implementation == "eager"
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_a_loss_that_a_model_forms_in_bfloat16():
    """As models with code of their own do: its rounding is no other loss."""
    model, rows = tiny_model("llama").bfloat16(), Rows.random(3)

    def own(logits, labels, **_):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.loss_function = own
    with grads_dist.record(model, ["lm_head"]) as recording:
        model(**batch_of(rows)).loss.backward()
    assert recording.factors.sum().item() == pytest.approx(1)
    model.loss_function = lambda *args, **kwargs: 1.1 * own(*args, **kwargs)
    with pytest.raises(ConfigError, match="something else is in it"), grads_dist.record(model, ["lm_head"]):
        model(**batch_of(rows))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_copy_made_meanwhile_is_a_model_of_its_own(architecture):
    """As of averaged weights: it must not compute with those of the model that is read."""
    model, batch = tiny_model(architecture), batch_of(Rows.random(3))
    with grads_dist.record(model, ["layers", "lm_head"]):
        copied = copy.deepcopy(model)
        expected = model(**batch).loss.item()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert copied(**batch).loss.item() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        assert copied(**batch).loss.item() == pytest.approx(expected, rel=1e-6)
