"""What the probe's benchmark runs on: a small model, rows as long as instructions, their micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.tokenize import tokenize
from grads_dist.data.tokenizer import TokenizerSource
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import load_text_config
from grads_dist.model.probed import Batch
from grads_dist.probe.batches import TokenSource, collate
from grads_dist.probe.plan import train_plan

MAX_LENGTH = 512
PAD = 0


@dataclass(frozen=True)
class Size:
    """Size of the random model, and typical length of the synthetic rows."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    median_tokens: int = 90
    max_tokens: int = MAX_LENGTH


SMOKE = Size(vocab=256, hidden=32, layers=2, median_tokens=12, max_tokens=48)


@dataclass(frozen=True)
class Work:
    """One micro-batch and whether it ends an optimizer step."""

    batch: Batch
    ends_step: bool

    @property
    def num_samples(self) -> int:
        """Rows of the batch."""
        return len(self.batch.rows)

    @property
    def num_tokens(self) -> int:
        """Real tokens of the batch, padding not counted."""
        return self.batch.layout.segments.num_rows


@dataclass(frozen=True)
class SyntheticRows:
    """Seeded rows as a token source: log-normal lengths, token ids by Zipf's law, an answer at the end."""

    ids: list[np.ndarray]
    masks: list[np.ndarray]
    pad_token_id: int = PAD

    @classmethod
    def draw(cls, count: int, size: Size, vocab: int, seed: int) -> SyntheticRows:
        """Rows whose median length is `size.median_tokens` and of whose tokens about 60 % carry loss."""
        rng = np.random.default_rng(seed)
        lengths = np.exp(rng.normal(np.log(size.median_tokens), 0.7, count)).astype(int)
        lengths = lengths.clip(4, size.max_tokens)
        shares = rng.beta(6, 4, count)
        frequency = 1 / (np.arange(1, vocab) + 2.7)
        ids, masks = [], []
        for length, share in zip(lengths, shares, strict=True):
            ids.append(rng.choice(np.arange(1, vocab), length, p=frequency / frequency.sum()))
            answer = min(max(1, round(share * length)), length - 1)
            masks.append(np.arange(length) >= length - answer)
        return cls(ids, masks)

    @classmethod
    def of_length(cls, count: int, length: int, vocab: int, seed: int) -> SyntheticRows:
        """Rows of one length, of which every token but the first carries loss."""
        rng = np.random.default_rng(seed)
        frequency = 1 / (np.arange(1, vocab) + 2.7)
        ids = rng.choice(np.arange(1, vocab), (count, length), p=frequency / frequency.sum())
        return cls(list(ids), [np.arange(length) >= 1] * count)

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of row i."""
        return self.ids[i]

    def loss_mask(self, i: int) -> np.ndarray:
        """Tokens of row i that carry loss."""
        return self.masks[i]


def save_random_model(folder: Path, size: Size, seed: int, kind: str = "llama") -> Path:
    """Write a random model of the given size: llama, gpt2 (tied, biases) or mixtral (2 of 8 experts)."""
    import transformers

    torch.manual_seed(seed)
    inner = size.hidden * 8 // 3 // 8 * 8 + 8
    common = {"vocab_size": size.vocab, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    decoder = {
        "hidden_size": size.hidden,
        "intermediate_size": inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": False,
    }
    gpt2 = {"n_positions": MAX_LENGTH, "n_embd": size.hidden, "n_layer": size.layers, "n_head": 4}
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **decoder))
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **gpt2))
    else:
        assert kind == "mixtral"
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, **decoder))
    model.save_pretrained(folder)
    return folder


def save_random_adapter(model_folder: Path, folder: Path) -> Path:
    """Write a random LoRA adapter of rank 16 for all linear layers of a Llama."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(folder)
    return folder


def tokenized_rows(path: str, model_folder: str, limit: int) -> tuple[TokenSource, np.ndarray]:
    """The first rows of a corpus as a run would tokenize them, and their lengths."""
    config = DataConfig(path=path, limit=limit, max_length=MAX_LENGTH)
    vocab_size = load_text_config(ModelConfig(name_or_path=model_folder)).vocab_size
    store = tokenize(config, Corpus.open(config), TokenizerSource(model_folder), vocab_size=vocab_size)
    return store, store.num_tokens


def synthetic_rows(count: int, size: Size, model_folder: str, seed: int) -> tuple[TokenSource, np.ndarray]:
    """Seeded rows of token ids that the model knows, and their lengths."""
    vocab = load_text_config(ModelConfig(name_or_path=model_folder)).vocab_size
    rows = SyntheticRows.draw(count, size, vocab, seed)
    return rows, np.array([len(ids) for ids in rows.ids])


def micro_batches(
    rows: TokenSource,
    num_tokens: np.ndarray,
    global_batch: int,
    batch_tokens: int,
    seed: int,
    device: torch.device,
) -> list[Work]:
    """All micro-batches of one epoch as the probe's plan cuts them, weighted for the mean over a step."""
    plan = train_plan(num_tokens, global_batch, batch_tokens, seed)
    work = []
    for step in range(plan.num_groups):
        batches = plan.batches_of(step)
        weight = 1 / len(plan.rows_of(step))
        for k in batches:
            chosen = plan.batch(k)
            batch = collate(rows, chosen, np.full(len(chosen), weight), device)
            work.append(Work(batch, ends_step=k == batches.stop - 1))
    return work
