"""The models of bench_step.py: standard shapes, random weights, and what a pass over them must compute."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_ADAM = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}


@dataclass(frozen=True)
class Shape:
    """A Llama and how it is trained on one GPU.

    Args:
        model: of LlamaConfig. Embedding and LM head are two weights.
        batch_tokens: tokens of a micro-batch.
        adam: options of torch's AdamW.
        bf16: options of DeepSpeed's bf16 section.
        checkpointing: gradient checkpointing, of all variants.
    """

    model: dict[str, int]
    batch_tokens: int
    adam: dict[str, Any] = field(default_factory=lambda: {"fused": True})
    bf16: dict[str, bool] = field(default_factory=dict)
    checkpointing: str = "none"

    @property
    def num_linear(self) -> int:
        """Elements of all matrices that every token is multiplied with, the LM head's among them."""
        hidden, inner = self.model["hidden_size"], self.model["intermediate_size"]
        kept = self.model["num_key_value_heads"] / self.model["num_attention_heads"]
        layer = round(hidden * hidden * (2 + 2 * kept)) + 3 * hidden * inner
        return self.model["num_hidden_layers"] * layer + self.model["vocab_size"] * hidden

    @property
    def num_parameters(self) -> int:
        """Elements of all weights but the norms' gains."""
        return self.num_linear + self.model["vocab_size"] * self.model["hidden_size"]

    def flops(self, length: int, num_rows: int, passes: str) -> float:
        """Operations of a micro-batch: `train`, `frozen` (no weight gradients) or `forward`.

        Two for every multiplication of a matrix product: 2 N a token forward for N matrix elements, and
        4 L W T a token in attention, for L layers of width W and rows of T tokens, masked pairs included;
        backward the same for the inputs (attention: twice) and, in training, for the weights. Statistics
        count for nothing, and neither do activations that are computed again.
        """
        tokens = length * num_rows
        linear = 2.0 * self.num_linear * tokens
        attention = 4.0 * self.model["num_hidden_layers"] * self.model["hidden_size"] * length * tokens
        if passes == "forward":
            return linear + attention
        return (3 if passes == "train" else 2) * linear + 3 * attention

    def save(self, folder: Path, device: torch.device) -> tuple[str, str]:
        """Write the model, made on `device`, and the DeepSpeed file; where they are."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(
            **self.model,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / "model")
        deepspeed = folder / "deepspeed.json"
        content = {
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": _ADAM | self.adam},
            "gradient_clipping": "auto",
            "bf16": {"enabled": True, **self.bf16},
        }
        deepspeed.write_text(json.dumps(content), encoding="utf-8")
        return str(folder / "model"), str(deepspeed)


def _llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kept: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kept,
    }


_ALL_BF16 = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
SHAPES = {
    "toy": Shape(_llama(256, 32, 96, 2, 4, 2), 128),
    "toy-bf16": Shape(_llama(256, 32, 96, 2, 4, 2), 128, {"foreach": False}, _ALL_BF16, "nonreentrant"),
    "1b": Shape(_llama(128256, 2048, 8192, 16, 32, 8), 8192),
    # In float32, its master weights and moments alone would take 96 GB. Neither torch's fused AdamW nor its
    # list form is known to take the one tensor of more than 2^31 elements that DeepSpeed makes of it.
    "8b": Shape(_llama(128256, 4096, 14336, 32, 32, 8), 4096, {"foreach": False}, _ALL_BF16, "nonreentrant"),
}
"""As Llama-3.2-1B (untied here) and Llama-3-8B; the toys are for the smoke run."""
