"""A mixture of experts kept as a list of modules, as models were written before transformers 5.

Also the code that a model folder brings along: it imports nothing of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class ListedConfig(LlamaConfig):
    model_type = "listed_moe"


class ListedExperts(nn.Module):
    """Calls each expert with its tokens' rows, copied out of the batch in the way that `dispatch` names."""

    def __init__(self, size: int, inner: int, dispatch: str = "index", num_experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(size, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, inner), nn.SiLU(), nn.Linear(inner, size))
            for _ in range(num_experts)
        )
        self.dispatch = dispatch

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, hidden.shape[-1])
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            if len(token):
                found = self.call(expert, self.rows(x, token))
                out.index_add_(0, token, found * weights[token, slot, None])
        return out.view_as(hidden)

    def call(self, expert: nn.Module, rows: Tensor) -> Tensor:
        return expert(input=rows) if self.dispatch == "keyword" else expert(rows)

    def rows(self, x: Tensor, token: Tensor) -> Tensor:
        if self.dispatch == "index":
            return x[token]
        if self.dispatch == "row":
            return x[None, token].reshape(-1, x.shape[-1])
        if self.dispatch == "index_select":
            return x.index_select(0, token)
        if self.dispatch == "mask":
            return x[torch.zeros(len(x), dtype=torch.bool).index_fill(0, token, True)]
        if self.dispatch == "keyword":
            return x[token]
        if self.dispatch == "repeat":
            return x.repeat_interleave(2, dim=0)[2 * token + 1]
        assert self.dispatch == "matrix"
        return nn.functional.one_hot(token, len(x)).to(x.dtype) @ x


class ListedForCausalLM(LlamaForCausalLM):
    """A Llama whose feed-forward layers are such mixtures."""

    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedExperts(config.hidden_size, config.intermediate_size)
        self.post_init()
