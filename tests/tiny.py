"""Tiny random models and rows, and the oracle: a batch-of-one autograd loop in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from grads_dist.model.load import disable_dropout

VOCAB = 61
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Prefix of the classes in transformers, and what differs from _COMMON; None leaves an option out.
ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {"pad_token_id": 2}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "final_logit_softcapping": 3.0, "pad_token_id": 0, "sliding_window": 8},
    ),
    "gpt2": ("GPT2", {**dict.fromkeys(_COMMON), **_GPT, "bos_token_id": 1, "eos_token_id": 2}),
    "mistral": ("Mistral", {"sliding_window": 4, "pad_token_id": 0}),
    "qwen3": ("Qwen3", {"head_dim": 8, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None, "pad_token_id": 0}),
    "opt": (
        "OPT",
        {"intermediate_size": None, "num_key_value_heads": None, "ffn_dim": 24, "word_embed_proj_dim": 16},
    ),
    "falcon": (
        "Falcon",
        {"intermediate_size": None, "num_key_value_heads": None, "bias": True, "pad_token_id": 0},
    ),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "mixtral": ("Mixtral", {**_MIXTURE, "pad_token_id": 0}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "pad_token_id": 0,
        },
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "pad_token_id": 0, "sliding_window": 8}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "sliding_window": 8, "pad_token_id": 0, **_MIXTURE}),
}


def tiny_model(name: str, **overrides: object) -> nn.Module:
    """A random model of the given architecture whose weights are large enough for gradients to differ."""
    torch.manual_seed(0)
    prefix, differences = ARCHITECTURES[name]
    options = {**_COMMON, **differences, **overrides}
    options = {key: value for key, value in options.items() if value is not None}
    config = getattr(transformers, f"{prefix}Config")(**options)
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(prefix, f"{prefix}ForCausalLM")
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    disable_dropout(model)
    return model


def tiny_llava() -> nn.Module:
    """A model that takes images of 2 x 2 patches, each at four tokens 60, with two layers for both."""
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=VOCAB, pad_token_id=0, **shared)
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **shared)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    return transformers.LlavaForConditionalGeneration(config)


@dataclass
class Rows:
    """Random rows as a token source; the last token id of the vocabulary never occurs."""

    ids: list[np.ndarray]
    masks: list[np.ndarray]
    pad_token_id: int = 0

    @classmethod
    def random(cls, count: int, seed: int = 0, longest: int = 14, vocab: int = VOCAB) -> Rows:
        """Rows of 2 to `longest` tokens with repeats, each with at least one token that carries loss."""
        rng = np.random.default_rng(seed)
        ids, masks = [], []
        for length in rng.integers(2, longest + 1, count):
            ids.append(rng.integers(0, vocab - 1, length, dtype=np.int32) // 2)
            mask = rng.random(length) < 0.6
            mask[0], mask[-1] = False, True
            masks.append(mask)
        return cls(ids, masks)

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of row i."""
        return self.ids[i]

    def loss_mask(self, i: int) -> np.ndarray:
        """Tokens of row i that carry loss."""
        return self.masks[i]


def autograd_loss(model: nn.Module, rows: Rows, i: int) -> Tensor:
    """Mean cross-entropy of row i over its label tokens, from the model's own logits."""
    ids = torch.from_numpy(rows.tokens(i).astype(np.int64))[None]
    mask = torch.from_numpy(rows.loss_mask(i))
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return nn.functional.cross_entropy(logits[mask[1:]], ids[0, 1:][mask[1:]])


def autograd_gradients(model: nn.Module, rows: Rows, i: int) -> dict[str, Tensor]:
    """Gradient of row i's loss for every parameter name; tied names share theirs."""
    model.zero_grad()
    autograd_loss(model, rows, i).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def untie(model: nn.Module) -> nn.Module:
    """Give the LM head its own copy of the embedding, so that autograd keeps both gradients apart."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def five(gradients: list[Tensor]) -> dict[str, float]:
    """The statistics of the concatenation of gradients, straight from their definition, in float64."""
    g = torch.cat([x.flatten() for x in gradients]).double()
    return {
        "sum": g.sum().item(),
        "sumsq": g.square().sum().item(),
        "min": g.min().item(),
        "max": g.max().item(),
        "mean": g.mean().item(),
        "std": g.std(correction=0).item(),
        "norm": g.norm().item(),
    }
