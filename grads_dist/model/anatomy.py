"""Where a causal language model keeps its embedding, its body, its decoder layers and its LM head."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grads_dist.errors import ConfigError
from grads_dist.stats.head_request import LogitTransform


@dataclass(frozen=True)
class Anatomy:
    """The parts of a transformers causal language model that the probe addresses by name."""

    model: PreTrainedModel
    embedding_name: str
    head_name: str
    layers: tuple[str, ...]
    tied: bool
    transform: LogitTransform

    @property
    def body(self) -> nn.Module:
        """The model without its LM head; returns an output with `last_hidden_state`."""
        return cast(nn.Module, self.model.base_model)

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding."""
        return cast(nn.Embedding, self.model.get_submodule(self.embedding_name))

    @property
    def head(self) -> nn.Linear:
        """The LM head."""
        return cast(nn.Linear, self.model.get_submodule(self.head_name))

    @property
    def text_part(self) -> str:
        """Of a model that takes more than text, the name of what its tokens go through; else empty."""
        if not self.layers or self.model.config.get_text_config() is self.model.config:
            return ""
        paths = [name.split(".") for name in (self.embedding_name, *self.layers)]
        return ".".join(os.path.commonprefix(paths))

    @property
    def vocab_size(self) -> int:
        """V, rows of the LM head, also where ZeRO-3 keeps only a shard of them here."""
        weight = self.head.weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])

    @property
    def head_counts(self) -> frozenset[int]:
        """Numbers of attention heads: sizes that a token axis must not be mistaken for."""
        config = self.model.config.get_text_config()
        names = ("num_attention_heads", "num_key_value_heads")
        return frozenset(n for name in names if (n := getattr(config, name, None)) is not None)

    @property
    def embedding_dim(self) -> int:
        """D, the size of a hidden state as the body returns it."""
        return self.head.in_features


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the parts of `model`; raises ConfigError naming the part that is not as expected."""
    kind = type(model).__name__
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"model: {kind} has an input embedding of type {_type_of(embedding)}, which has no rule"
        )
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"model: {kind} has an LM head of type {_type_of(head)}; a linear one is needed")
    if model.base_model is model:
        raise ConfigError(f"model: {kind} does not separate its body from its LM head")
    return Anatomy(
        model=model,
        embedding_name=names[id(embedding)],
        head_name=names[id(head)],
        layers=_decoder_layers(model, names),
        tied=embedding.weight is head.weight,
        transform=_logit_transform(model.config),
    )


def _type_of(module: object) -> str:
    """A type's name, with where it is from: PEFT's layers are called as those they replace."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__name__}"


def _decoder_layers(model: PreTrainedModel, names: dict[int, str]) -> tuple[str, ...]:
    """Names of the decoder layers: the outermost module list with one module a hidden layer.

    Searched for from the input embedding outwards, as an image encoder may have layers of the same number.
    """
    depth = model.config.get_text_config().num_hidden_layers
    part = names[id(model.get_input_embeddings())]
    while part:
        part = part.rpartition(".")[0]
        for module in model.get_submodule(part).modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth and _is_layer(model, module[0]):
                return tuple(names[id(layer)] for layer in module)
    return ()


def _is_layer(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a module is a decoder layer, by the class names that the model keeps for splitting it."""
    names = model._no_split_modules
    return not names or type(module).__name__ in names


def _logit_transform(config: object) -> LogitTransform:
    """What the model does to the head's output, read from its configuration; `check_head` verifies it."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale=scale, softcap=float(softcap) if softcap else None)


@torch.no_grad()
def check_head(anatomy: Anatomy, device: torch.device) -> None:
    """Compare the model's own logits with body, head and transform on a few tokens.

    Under ZeRO-3 all ranks call it together. Raises ConfigError when the model is not causal (padding on the
    right must not be seen), when its forward pass is random, or when it does something to its logits that the
    fused loss would not know of.
    """
    kind = type(anatomy.model).__name__
    ids = (torch.arange(8, device=device) * 7 % anatomy.vocab_size).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % anatomy.vocab_size
    expected, again = (anatomy.model(input_ids=ids, use_cache=False).logits.double() for _ in range(2))
    eps = torch.finfo(anatomy.head.weight.dtype).eps
    tolerance = 4 * max(eps, torch.finfo(torch.float32).eps) * max(1.0, expected.abs().max().item())

    def differ(x: Tensor, y: Tensor) -> bool:
        return not (x - y).abs().max().item() <= tolerance

    if differ(expected, again):
        raise ConfigError(f"model: {kind} gives different logits for the same tokens; switch its noise off")
    if differ(expected[0, :-1], expected[1, :-1]):
        raise ConfigError(f"model: {kind} is no causal language model: early logits depend on later tokens")
    hidden: Tensor = anatomy.body(input_ids=ids, use_cache=False).last_hidden_state
    actual = anatomy.transform(anatomy.head(hidden).double())
    if differ(actual, expected):
        raise ConfigError(
            f"model: {kind} changes its logits behind the LM head in a way that is not known; its gradients "
            f"cannot be read"
        )
