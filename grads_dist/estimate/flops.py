"""Floating-point operations of a probe: two for every multiplication of a matrix product, no others.

A token passes every linear weight of the body once: 2 N operations forward, 2 N for the gradient by the
input, 2 N for that of a trained weight, in all the usual 6 N. Attention multiplies every pair of positions
twice, masked ones too, as without a kernel that skips them: 4 T^2 W a layer for W = heads times their size,
and twice that backward. The LM head sees label positions alone. Statistics: docs/kernels.md, "What it costs
at the least".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_dist.estimate.facts import Facts, LinearWeight
from grads_dist.estimate.workload import BatchSizes, Pass, sizes_of
from grads_dist.model.config import ModelConfig
from grads_dist.probe.config import ProbeConfig
from grads_dist.stats.certificate import FIRST_ROWS, PASSES, pays


@dataclass(frozen=True)
class Flops:
    """Operations of one pass, or of several."""

    forward: float = 0.0
    recomputed: float = 0.0
    """Forward passes again, under gradient checkpointing."""
    input_gradients: float = 0.0
    weight_gradients: float = 0.0
    shared: float = 0.0
    """Weight gradients that come out of the products of the statistics, in float32."""
    statistics: float = 0.0
    """Statistics and sketches that training has no use for, in float32."""

    def __add__(self, other: Flops) -> Flops:
        """Both together."""
        return Flops(*(a + b for a, b in zip(self.parts.values(), other.parts.values(), strict=True)))

    @property
    def parts(self) -> dict[str, float]:
        """All of them by name."""
        return dict(vars(self))

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())

    @property
    def in_float32(self) -> float:
        """What is float32 whatever the model's type."""
        return self.shared + self.statistics


def flops_of(work: Pass, facts: Facts, probe: ProbeConfig, model: ModelConfig) -> Flops:
    """Operations of a pass over all its rows."""
    sizes, times = sizes_of(work), work.times
    head = 2.0 * facts.vocab_size * facts.hidden_size * float(sizes.labels.sum())
    forward = _body(facts, sizes, lowest=0)
    if work.kind == "features":
        return Flops(forward=forward * times)
    statistics = _statistics(work, facts, probe) if work.kind != "train" else 0.0
    if work.kind == "measure":
        if not facts.needs_backward:
            return Flops(forward=(forward + head) * times, statistics=statistics * times)
        weights = shared = head_weight = 0.0
    else:
        trained = [weight for weight in facts.weights if weight.trained]
        own, of_products = (
            2.0 * float(sizes.padded.sum()) * sum(w.multiplications for w in trained if w.shared is kind)
            for kind in (False, True)
        )
        head_weight = head if facts.head_trained else 0.0
        weights, shared = own, of_products
        if work.kind == "train":
            weights, shared = own + of_products, 0.0
    head_shared = head_weight if _head_shares(facts) and work.kind == "probe" else 0.0
    backward = 2.0 * _body(facts, sizes, facts.lowest) - _saved_by_linear(facts, sizes)
    return Flops(
        forward=(forward + head) * times,
        recomputed=forward * times if model.gradient_checkpointing != "none" else 0.0,
        input_gradients=(backward + head) * times,
        weight_gradients=(weights + head_weight - head_shared) * times,
        shared=(shared + head_shared) * times,
        statistics=statistics * times,
    )


def _body(facts: Facts, sizes: BatchSizes, lowest: int) -> float:
    """Forward operations of the layers from `lowest` on."""
    linear = 2.0 * sum(w.multiplications for w in facts.weights if w.depth >= lowest)
    attention = 4.0 * facts.attention_width * max(0, facts.num_layers - lowest)
    return linear * float(sizes.padded.sum()) + attention * float(sizes.squares.sum())


def _saved_by_linear(facts: Facts, sizes: BatchSizes) -> float:
    """Going backward, attention costs two products for each of its own; a linear weight one for its input."""
    linear = 2.0 * sum(w.multiplications for w in facts.weights if w.depth >= facts.lowest)
    return linear * float(sizes.padded.sum())


def _head_shares(facts: Facts) -> bool:
    """Whether training takes the head's weight gradient from its statistics' products (HeadPass)."""
    return facts.head_trained and facts.head_read and not facts.head_tied


def _statistics(work: Pass, facts: Facts, probe: ProbeConfig) -> float:
    """Operations of the statistics and sketches of all rows of a pass, without those that training shares."""
    plan, batches = work.plan, work.batches
    order = plan.order[plan.batch_offsets[batches.start] : plan.batch_offsets[batches.stop]]
    tokens = work.rows.num_tokens[order].astype(np.float64)
    labels = work.rows.num_label_tokens[order].astype(np.float64)
    total = 0.0
    for weight in facts.weights:
        if weight.read and not (weight.shared and work.kind == "probe"):
            total += _outer_products(weight, tokens * weight.tokens, probe.statistics == "all")
    if facts.head_read and not (_head_shares(facts) and work.kind == "probe"):
        total += _head(facts, labels, probe.statistics == "all")
    return total + (_sketches(facts, tokens, labels, probe) if work.with_sketches else 0.0)


def _outer_products(weight: LinearWeight, tokens: np.ndarray, extremes: bool) -> float:
    """2 T P D a sample; without extremes the Gram form where that is cheaper."""
    sides = weight.outputs + weight.inputs
    products = 2.0 * tokens * weight.outputs * weight.inputs
    if extremes:
        return float(products.sum())
    return float(
        np.where(tokens * sides <= weight.outputs * weight.inputs, 2 * tokens**2 * sides, products).sum()
    )


def _head(facts: Facts, labels: np.ndarray, extremes: bool) -> float:
    """Gram matrices and the rows that a bound leaves, where that pays, else the product."""
    vocab, dim = facts.vocab_size, facts.hidden_size
    products = 2.0 * labels * vocab * dim
    gram = 2.0 * labels**2 * (vocab + dim)
    if not extremes:
        return float(np.where(2 * labels < dim, gram, products).sum())
    bounded = np.array([pays(int(n), vocab, dim) for n in np.unique(labels)])
    certified = bounded[np.searchsorted(np.unique(labels), labels)]
    with_bound = gram + 2.0 * FIRST_ROWS * labels * dim + PASSES * labels * vocab
    return float(np.where(certified, with_bound, products).sum())


def _sketches(facts: Facts, tokens: np.ndarray, labels: np.ndarray, probe: ProbeConfig) -> float:
    """T k (P + D) for the projections and T k^2 for their products, in multiplications."""
    size = probe.gradient_dim**0.5
    total = sum(
        w.sketched * w.tokens * size * (w.outputs + w.inputs + size) * float(tokens.sum())
        for w in facts.weights
    )
    head = facts.head_sketched * size * (facts.vocab_size + facts.hidden_size + size)
    return 2.0 * (total + head * float(labels.sum()))
