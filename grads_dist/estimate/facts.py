"""What of a model its cost depends on, read off the model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from grads_dist.model.anatomy import Anatomy
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.features import gradient_sketcher
from grads_dist.stats.experts import expert_parameters, is_fused_experts
from grads_dist.stats.routed import expert_blocks
from grads_dist.stats.shared import can_share
from grads_dist.stats.targets import TIED, Targets, resolve_targets


@dataclass(frozen=True)
class LinearWeight:
    """A weight that multiplies tokens, or the stacked ones of a layer's experts.

    Args:
        outputs, inputs: its sides P and D.
        tokens: how many times it, or one of the experts, is applied a token on average.
        depth: number of its decoder layer.
        trained: whether training changes it.
        read: whether statistics are read of its gradient.
        shared: whether training takes its gradient from the products of the statistics.
        sketched: in how many gradient features it takes part.
    """

    outputs: int
    inputs: int
    tokens: float
    depth: int
    trained: bool
    read: bool
    shared: bool
    sketched: int

    @property
    def multiplications(self) -> float:
        """Multiplications a token."""
        return self.outputs * self.inputs * self.tokens


@dataclass(frozen=True)
class Facts:
    """A causal language model with the targets of a probe."""

    num_params: int
    num_trained: int
    weight_bytes: int
    """Of all parameters, in the type they are probed in."""
    trained_bytes: int
    weights: tuple[LinearWeight, ...]
    """All linear weights of the body."""
    read: frozenset[str]
    """Parameters of the body whose layers are read."""
    lowest: int
    """The lowest layer that the backward pass reaches; the number of layers if it reaches none."""
    needs_backward: bool
    """Whether statistics need a backward pass through the body at all."""
    num_layers: int
    attention_width: int
    """Heads times the size of one."""
    hidden_size: int
    vocab_size: int
    head_trained: bool
    head_read: bool
    head_tied: bool
    """Whether the sum of embedding and head is a target."""
    head_sketched: int
    embedding_params: int
    head_params: int
    """0 where the head's weight is the embedding's."""
    largest_weight: int
    """Elements of the largest parameter."""
    targets: Targets


def model_facts(anatomy: Anatomy, probe: ProbeConfig, dtype: torch.dtype) -> Facts:
    """Look at a model on the meta device; raises ConfigError for targets as `resolve_targets` does."""
    model, training = anatomy.model, probe.mode == "train"
    targets = resolve_targets(probe.targets, anatomy)
    sketcher = gradient_sketcher(probe, anatomy)
    sketched = sketcher.parameters if sketcher is not None else frozenset()
    wanted = set(targets.parameters) | sketched
    embedding, head = f"{anatomy.embedding_name}.weight", f"{anatomy.head_name}.weight"
    if TIED in wanted:
        wanted.add(embedding)
    in_body = wanted - {TIED, head, f"{anatomy.head_name}.bias"}
    parameters = list(model.parameters())
    trained = [p for p in parameters if training and p.requires_grad]
    reached = in_body | {
        name for name, p in model.named_parameters() if training and p.requires_grad and name != head
    }
    text = model.config.get_text_config()
    num_heads = getattr(text, "num_attention_heads", 0) or 0
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(1, num_heads)
    counts = {name: len(sketcher.of(name)) for name in sketched} if sketcher is not None else {}
    return Facts(
        num_params=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in trained),
        weight_bytes=sum(_bytes(p, dtype) for p in parameters),
        trained_bytes=sum(_bytes(p, dtype) for p in trained),
        weights=tuple(_linear_weights(anatomy, in_body & targets.parameters, counts, training)),
        read=frozenset(in_body),
        lowest=min((_depth(name, anatomy) for name in reached), default=len(anatomy.layers)),
        needs_backward=bool(in_body),
        num_layers=len(anatomy.layers) or text.num_hidden_layers,
        attention_width=num_heads * head_dim,
        hidden_size=anatomy.embedding_dim,
        vocab_size=anatomy.vocab_size,
        head_trained=training and anatomy.head.weight.requires_grad,
        head_read=bool({head, TIED} & targets.parameters),
        head_tied=TIED in targets.parameters,
        head_sketched=counts.get(head, 0) + counts.get(TIED, 0),
        embedding_params=anatomy.embedding.weight.numel(),
        head_params=0 if anatomy.tied else anatomy.head.weight.numel(),
        largest_weight=max(p.numel() for p in parameters),
        targets=targets,
    )


def _bytes(parameter: nn.Parameter, dtype: torch.dtype) -> int:
    """Packed integers of a quantised layer stay as they are."""
    size = dtype.itemsize if parameter.is_floating_point() else parameter.element_size()
    return parameter.numel() * size


def _depth(name: str, anatomy: Anatomy) -> int:
    """The decoder layer that a parameter belongs to: the first for the embedding, past the last for what
    comes behind."""
    for depth, layer in enumerate(anatomy.layers):
        if name.startswith(f"{layer}."):
            return depth
    return 0 if name.startswith(f"{anatomy.embedding_name}.") else len(anatomy.layers)


def _linear_weights(
    anatomy: Anatomy, read: set[str], sketched: dict[str, int], training: bool
) -> Iterator[LinearWeight]:
    text = anatomy.model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    shares = {
        f"{name}.experts.": chosen / len(list(block.get_submodule("experts").children()))
        for name, block in expert_blocks(anatomy.model).items()
    }
    inside = f"{anatomy.text_part}." if anatomy.text_part else ""
    for owner, module in anatomy.model.named_modules():
        if owner == anatomy.head_name or isinstance(module, nn.Embedding) or not owner.startswith(inside):
            continue
        fused = expert_parameters(module) if is_fused_experts(module) else ()
        for local, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or (fused and local not in fused) or (fused and parameter.ndim < 3):
                continue
            name = f"{owner}.{local}"
            share = next((share for prefix, share in shares.items() if owner.startswith(prefix)), 1.0)
            sides = _sides(module, parameter)
            yield LinearWeight(
                *sides,
                tokens=chosen if fused else share,
                depth=_depth(name, anatomy),
                trained=training and parameter.requires_grad,
                read=name in read,
                shared=training and name in read and can_share(module) and share == 1.0,
                sketched=sketched.get(name, 0),
            )


def _sides(module: nn.Module, parameter: nn.Parameter) -> tuple[int, int]:
    """P and D; a quantised layer's weight does not have them as its shape."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return int(parameter.shape[-2]), int(parameter.shape[-1])
