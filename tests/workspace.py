"""A user's folder: a tiny model with its tokenizer, a corpus, and runs of the program over them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import clean_environment
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["gradient", "sample", "loss", "token", "model", "select", "data", "learn", "forget", "less", "more"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder: Path, architecture: str = "llama", **overrides: object) -> Path:
    """Save a tiny random model and its tokenizer."""
    tokenizer = make_tokenizer()
    model = tiny_model(architecture, vocab_size=len(tokenizer), **overrides)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Short chats; every tenth row repeats the one before it."""
    rng = np.random.default_rng(seed)
    rows: list[dict] = []
    for i in range(count):
        if i % 10 == 9:
            rows.append({"id": f"row{i}", "messages": rows[-1]["messages"]})
            continue
        question, answer = (" ".join(rng.choice(WORDS, rng.integers(1, n))) for n in (6, 12))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"row{i}", "messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_stage(folder: Path, stage: int, **optimizer: object) -> Path:
    """A DeepSpeed file of a ZeRO stage; `optimizer` are parameters of AdamW."""
    zero = {"stage": stage}
    if stage == 3:
        # By default DeepSpeed keeps weights below 10^5 elements whole on every rank: all of a tiny model.
        zero["stage3_param_persistence_threshold"] = 0
    content: dict[str, object] = {"zero_optimization": zero}
    if optimizer:
        content["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", **optimizer}}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def probe_alone(folder: Path, num_rows: int, args: list[str]) -> Path:
    """Make a model and a corpus in `folder` and run the program on them as one rank, for comparison."""
    make_model(folder / "model")
    write_jsonl(folder / "corpus.jsonl", make_rows(num_rows))
    done = run_program(*args)
    assert done.returncode == 0, done.stderr
    return folder


def launch(num_ranks: int, script: Path, *args: str) -> None:
    """Run a script as `num_ranks` ranks under torchrun; fails with what it wrote unless it ends well."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = run_python(*command, str(script), *args, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def run_program(*args: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m grads_dist ARGS...` as one rank."""
    return run_python("-m", "grads_dist", *args)


def run_python(*args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS...` as one rank."""
    command = [sys.executable, *args]
    return subprocess.run(command, env=clean_environment(), text=True, capture_output=True, timeout=timeout)


def run_arguments(folder: Path, output: str, **overrides: object) -> list[str]:
    """Arguments of a small run over `folder`/model and `folder`/corpus.jsonl, dotted overrides appended."""
    fields: dict[str, object] = {
        "model.name_or_path": folder / "model",
        "data.path": folder / "corpus.jsonl",
        "data.cache_dir": folder / "cache",
        "data.max_length": 48,
        "data.num_workers": 1,
        "probe.global_batch": 8,
        "probe.batch_tokens": 128,
        "probe.shard_rows": 16,
        "similarity.k": 3,
        "output_dir": folder / output,
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]
