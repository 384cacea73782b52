"""A small Llama, pretrained for some hundred steps: random weights have no gradients worth reading."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grads_dist.demo.size import DemoSize

logger = logging.getLogger(__name__)

LEARNING_RATE = 4e-3
WARMUP_SHARE = 0.1
LOG_EVERY = 60


@dataclass(frozen=True)
class PretrainResult:
    """What the pretraining cost and gained."""

    num_parameters: int
    num_tokens: int
    first_loss: float
    """Nats a token of the first step, from random weights."""
    last_loss: float
    """Mean over the last tenth of the steps."""


def pretrain(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, size: DemoSize
) -> tuple[LlamaForCausalLM, PretrainResult]:
    """Return a model trained on `rows` as rendered by the chat template, and how that went.

    Every token carries loss and the rows are packed one after the other, as in ordinary pretraining. The text
    is repeated where it is shorter than the steps need. The same `rows` and `size` give the same steps.
    """
    batches = _batches(rows, tokenizer, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size.seed)
        model = LlamaForCausalLM(
            model_config(len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id, size=size)
        )
    losses = _train(model, batches)
    tail = losses[-max(1, len(losses) // 10) :]
    result = PretrainResult(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_tokens=batches.numel(),
        first_loss=losses[0],
        last_loss=sum(tail) / len(tail),
    )
    return model, result


def model_config(vocab_size: int, eos: int, pad: int, size: DemoSize) -> LlamaConfig:
    """Return the architecture of the demo's model; embedding and LM head are two weights, so two targets."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 8 // 3,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=size.max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _batches(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, size: DemoSize
) -> torch.Tensor:
    """Return int64 token ids [steps, sequences, tokens]."""
    order = np.random.default_rng(size.seed).permutation(len(rows))
    texts = [tokenizer.apply_chat_template(rows[i]["messages"], tokenize=False) for i in order]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
    shape = (size.pretrain_steps, size.pretrain_batch, size.sequence_length)
    return torch.from_numpy(np.resize(stream, shape))


def _train(model: LlamaForCausalLM, batches: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    shares = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_share(step, len(batches)))
    model.train()
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shares.step()
        losses.append(loss.item())
        if len(losses) % LOG_EVERY == 0:
            recent = sum(losses[-LOG_EVERY:]) / LOG_EVERY
            logger.info("pretraining: step %d of %d, loss %.3f", len(losses), len(batches), recent)
    return losses


def _rate_share(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step: linear warmup, then linear decay to zero."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    return min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
