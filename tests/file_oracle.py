"""What the score table of a model folder and a corpus of chats must hold, by a batch-of-one autograd loop in
float64 that shares no code with the package."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tiny import Rows, autograd_gradients, autograd_loss, five, untie
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDING = {
    "llama": "model.embed_tokens.weight",
    "qwen2": "model.embed_tokens.weight",
    "gemma2": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
}
LAYERS = {"llama": "model.layers", "qwen2": "model.layers", "gpt2": "transformer.h"}


def tokenize(folder: Path, rows: list[dict], max_length: int) -> Rows:
    """Token ids and loss masks by transformers itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, masks = [], []
    for row in rows:
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids.append(np.array(encoded["input_ids"][:max_length], np.int32))
        masks.append(np.array(encoded["assistant_masks"][:max_length], bool))
    return Rows(ids, masks)


def members(kind: str, tied: dict[str, Tensor], split: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """The gradients that each target concatenates: three patterns for Gemma-2, names otherwise."""
    if kind == "gemma2":
        once = {name: g for name, g in tied.items() if name != "lm_head.weight"}
        return {
            "everything": list(once.values()),
            "norms": [g for name, g in once.items() if name.endswith("norm.weight")],
            "down": [g for name, g in once.items() if name.endswith("down_proj.weight")],
        }
    targets = {"embedding": [split[EMBEDDING[kind]]], "lm_head": [split["lm_head.weight"]]}
    if kind == "gpt2":
        targets["tied"] = [tied[EMBEDDING[kind]]]
    for name, gradient in split.items():
        layer = re.match(rf"{re.escape(LAYERS[kind])}\.(\d+)\.", name)
        if layer:
            targets.setdefault(f"layers.{layer.group(1)}", []).append(gradient)
    return targets


def oracle_table(
    folder: Path, kind: str, rows: list[dict], max_length: int
) -> tuple[pa.Table, dict[str, int]]:
    """Loss and statistics of every row, sorted by id, and the size of every target."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    split_model: nn.Module = untie(copy.deepcopy(model))
    rows = sorted(rows, key=lambda row: row["id"])
    source = tokenize(folder, rows, max_length)
    columns: dict[str, list] = {"id": [row["id"] for row in rows]}
    columns["num_tokens"] = [len(ids) for ids in source.ids]
    columns["num_label_tokens"] = [int(mask.sum()) for mask in source.masks]
    numel: dict[str, int] = {}
    for i in range(len(rows)):
        columns.setdefault("loss", []).append(autograd_loss(model, source, i).item())
        gradients = members(
            kind, autograd_gradients(model, source, i), autograd_gradients(split_model, source, i)
        )
        for target, parts in gradients.items():
            numel[target] = sum(part.numel() for part in parts)
            for name, value in five(parts).items():
                columns.setdefault(f"{target}.{name}", []).append(value)
    return pa.table(columns), numel
