"""Where a causal language model keeps its embedding, its body, its decoder layers and its LM head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grads_dist.errors import ConfigError
from grads_dist.stats.head_pass import LogitTransform


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
    def vocab_size(self) -> int:
        """V, rows of the LM head, also where ZeRO-3 keeps only a shard of them here."""
        weight = self.head.weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])

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
            f"model: {kind} has an input embedding of type {type(embedding).__name__}, which has no rule"
        )
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"model: {kind} has an LM head of type {type(head).__name__}; a linear one is needed"
        )
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


def _decoder_layers(model: PreTrainedModel, names: dict[int, str]) -> tuple[str, ...]:
    """Names of the decoder layers: the outermost module list with one module a hidden layer."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return tuple(names[id(layer)] for layer in module)
    return ()


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

    Under ZeRO-3 all ranks call it together. Raises ConfigError when they differ: the model does something to
    its logits that the fused loss would not know of.
    """
    ids = (torch.arange(8, device=device) * 7 % anatomy.vocab_size)[None]
    expected = anatomy.model(input_ids=ids, use_cache=False).logits
    hidden: Tensor = anatomy.body(input_ids=ids, use_cache=False).last_hidden_state
    actual = anatomy.transform(anatomy.head(hidden).to(torch.float64))
    error = (actual - expected.to(torch.float64)).abs().max().item()
    tolerance = 4 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    if not error <= tolerance:
        raise ConfigError(
            f"model: {type(anatomy.model).__name__} changes its logits behind the LM head in a way that is "
            f"not known (largest difference {error:.3g}); its gradients cannot be read"
        )
