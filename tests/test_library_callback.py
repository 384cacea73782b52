"""The score table of a Trainer's and an SFTTrainer's own run against the oracle; and the run stays theirs."""

from __future__ import annotations

import copy
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from library_cases import check_table, collate, dataset_of, gradients_of
from peft import LoraConfig, get_peft_model
from tiny import Rows, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from workspace import make_rows, make_tokenizer, write_jsonl

from grads_dist import ScoreTableCallback
from grads_dist.commands import prepare
from grads_dist.config import Config
from grads_dist.data.config import DataConfig
from grads_dist.data.encode import token_hash
from grads_dist.errors import ConfigError
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.run import select_from
from grads_dist.selection.select import select
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.table.schema import score_schema

IN_FLOAT32 = 2e-5
"""A pass in float32 against one in float64, relative to the gradient: its rounding, through two layers."""
WEIGHT_BOUND = 1e-5
"""After 4 steps of Adam of up to 1e-2 each: the rounding of gradients (2e-7 of 0.1), over epsilon."""
NUM_ROWS = 11
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DEFAULT = {"embedding": [EMBEDDING], "lm_head": [HEAD]}
NO_GRAPH = SelectionConfig(fraction=0.5, weights=Weights(g=1.0, d=0.0, r=0.0))


def arguments(tmp_path, kind=TrainingArguments, **options):
    defaults = {
        "output_dir": str(tmp_path / "trainer"),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return kind(**(defaults | options))


def train(tmp_path, model, rows, trainer_type=Trainer, targets=("embedding", "lm_head"), **options):
    """Train a copy of the model with the callback; returns the trainer."""
    kind, extra = TrainingArguments, {"data_collator": collate}
    if trainer_type is SFTTrainer:
        kind, extra = SFTConfig, {"processing_class": make_tokenizer()}
        options = {"bf16": False, "max_length": 64} | options
    args = arguments(tmp_path, kind, **options)
    dataset = rows if isinstance(rows, Dataset) else dataset_of(rows)
    eval_rows = dataset.select(range(3)) if args.eval_strategy != "no" else None
    trainer = trainer_type(copy.deepcopy(model), args, train_dataset=dataset, eval_dataset=eval_rows, **extra)
    trainer.add_callback(ScoreTableCallback(trainer, tmp_path / "run", targets=targets, shard_rows=4))
    trainer.train()
    return trainer


def parameters_of(model, *prefixes):
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def hooks_of_ours(model):
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if (hook.__module__ or "").startswith("grads_dist")]


OPTIONS = {
    "plain": {},
    "second epoch and evaluation inside the first": {
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "a mean a micro-batch, not a token mean": {"average_tokens_across_devices": False},
    "recomputation": {"gradient_checkpointing": True},
    "workers": {"dataloader_num_workers": 1},
    "batches of even length": {"train_sampling_strategy": "batch_rebalance"},
    "by length": {"train_sampling_strategy": "group_by_length"},
}


# What only the data loader does is the same for both trainers.
CASES = [(Trainer, name) for name in OPTIONS] + [(SFTTrainer, name) for name in list(OPTIONS)[:4]]


@pytest.mark.parametrize("trainer_type, options", CASES)
def test_table_equals_the_oracle(tmp_path, trainer_type, options):
    model, rows = tiny_model("llama"), Rows.random(NUM_ROWS)
    layer = {
        "layers.0": parameters_of(model, "model.layers.0."),
        "layers.1": parameters_of(model, "model.layers.1."),
    }
    trainer = train(
        tmp_path, model, rows, trainer_type, ["embedding", "lm_head", "layers"], **OPTIONS[options]
    )
    table = check_table(
        tmp_path / "run" / "scores.parquet", model.double(), rows, DEFAULT | layer, IN_FLOAT32
    )
    assert table.schema.equals(score_schema(["embedding", "lm_head", "layers.0", "layers.1"]))
    assert table["id"].to_pylist() == [f"row{i}" for i in range(NUM_ROWS)]
    hashes = [token_hash(ids, mask) for ids, mask in zip(rows.ids, rows.masks, strict=True)]
    assert table["token_hash"].to_pylist() == hashes
    trainer.train()  # a second training is the user's alone
    assert sorted(table["step"].to_pylist()) == [0] * 6 + [1] * 5
    assert len(list((tmp_path / "run" / "scores").iterdir())) > 1
    assert not hooks_of_ours(trainer.model)


@pytest.mark.parametrize("trainer_type", [Trainer, SFTTrainer])
def test_tied_weights(tmp_path, trainer_type):
    model, rows = tiny_model("gpt2"), Rows.random(NUM_ROWS)
    train(tmp_path, model, rows, trainer_type, ["embedding", "lm_head", "tied"])
    names = {
        "embedding": ["transformer.wte.weight"],
        "lm_head": [HEAD],
        "tied": ["tied embedding and LM head"],
    }
    check_table(tmp_path / "run" / "scores.parquet", model.double(), rows, names, IN_FLOAT32)


@pytest.mark.parametrize("trainer_type", [Trainer, SFTTrainer])
def test_adapters(tmp_path, trainer_type):
    rows = Rows.random(NUM_ROWS)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0)
    model = get_peft_model(tiny_model("llama"), lora)
    train(tmp_path, model, rows, trainer_type, ["adapters", "lm_head"])
    base = model.get_base_model().double().requires_grad_(True)
    names = {"adapters": [n for n, _ in base.named_parameters() if ".lora_" in n], "lm_head": [HEAD]}
    check_table(tmp_path / "run" / "scores.parquet", base, rows, names, IN_FLOAT32)


def test_bfloat16(tmp_path):
    model, rows = tiny_model("llama"), Rows.random(NUM_ROWS)
    for trainer_type in (Trainer, SFTTrainer):
        folder = tmp_path / trainer_type.__name__
        train(folder, model, rows, trainer_type, bf16=True)
        table = pq.read_table(folder / "run" / "scores.parquet")
        truth = [gradients_of(copy.deepcopy(model).double(), rows, i) for i in range(NUM_ROWS)]
        for target, (name,) in DEFAULT.items():
            norms = [by_name[name].norm().item() for by_name in truth]
            np.testing.assert_allclose(table[f"{target}.norm"].to_numpy(), norms, rtol=0.05)


class Losses(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.logged: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logged.append({name: logs[name] for name in ("loss", "grad_norm", "eval_loss") if name in logs})


@pytest.mark.parametrize("trainer_type", [Trainer, SFTTrainer])
def test_training_is_unchanged(tmp_path, trainer_type):
    results = []
    for reading in (False, True):
        kind = SFTConfig if trainer_type is SFTTrainer else TrainingArguments
        options = {
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-3,
            "num_train_epochs": 2,
            "logging_strategy": "steps",
            "logging_steps": 1,
        }
        options |= {"eval_strategy": "epoch"} | ({"bf16": False} if kind is SFTConfig else {})
        extra = {"processing_class": make_tokenizer()} if kind is SFTConfig else {"data_collator": collate}
        rows, losses = dataset_of(Rows.random(NUM_ROWS)), Losses()
        trainer = trainer_type(
            tiny_model("llama"),
            arguments(tmp_path / str(reading), kind, **options),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[losses],
            **extra,
        )
        own = trainer.get_train_dataloader, trainer.training_step
        if reading:
            trainer.add_callback(
                ScoreTableCallback(trainer, tmp_path / "run", targets=["embedding", "linear"])
            )
        trainer.train()
        assert (trainer.get_train_dataloader, trainer.training_step) == own
        assert trainer.train_dataset.column_names == rows.column_names
        results.append((losses.logged, [p.detach() for p in trainer.model.parameters()]))
    (plain, weights), (read, weights_read) = results
    assert len(plain) == 7
    assert read == [
        {name: pytest.approx(value, rel=1e-5) for name, value in entry.items()} for entry in plain
    ]
    for p, q in zip(weights, weights_read, strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=WEIGHT_BOUND)


def test_the_table_can_be_selected_from(tmp_path):
    train(tmp_path, tiny_model("llama"), Rows.random(NUM_ROWS))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["targets"] == {"embedding": {"numel": 61 * 16}, "lm_head": {"numel": 61 * 16}}
    assert manifest["plan"] == {"optimizer_steps": 2, "rows": NUM_ROWS, "world_size": 1}
    table = pq.read_table(tmp_path / "run" / "scores.parquet")
    chosen = select(table, None, NO_GRAPH, SimilarityConfig(), list(manifest["targets"]))
    assert len(chosen.selected_index) == round(NUM_ROWS / 2)
    config = Config(data=DataConfig(path="unread"), selection=NO_GRAPH, output_dir=str(tmp_path / "run"))
    assert (select_from(config, RunDir(tmp_path / "run")).selected_index == chosen.selected_index).all()


def test_the_command_line_selects_from_the_file_that_was_trained_on(tmp_path):
    chats = make_rows(12)
    write_jsonl(tmp_path / "corpus.jsonl", chats)
    tokenizer = make_tokenizer()
    trainer = SFTTrainer(
        tiny_model("llama", vocab_size=len(tokenizer)),
        arguments(tmp_path, SFTConfig, bf16=False),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
    )
    table = ScoreTableCallback(trainer, tmp_path / "run", corpus=tmp_path / "corpus.jsonl")
    trainer.add_callback(table)
    trainer.train()
    prepare(["select", "--output_dir", str(tmp_path / "run"), "--selection.rows", "3"])()
    lines = (tmp_path / "run" / "selection" / "default" / "subset.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line) in chats for line in lines)


def test_the_corpus_must_be_the_dataset(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", make_rows(3))
    rows = dataset_of(Rows.random(4))
    trainer = Trainer(tiny_model("llama"), arguments(tmp_path), train_dataset=rows, data_collator=collate)
    trainer.add_callback(ScoreTableCallback(trainer, tmp_path / "run", corpus=tmp_path / "corpus.jsonl"))
    with pytest.raises(ConfigError, match="has 3 rows and train_dataset 4"):
        trainer.train()


def test_rows_without_labels_are_rejected(tmp_path):
    model, rows = tiny_model("llama"), Rows.random(5)
    whole = dataset_of(rows)
    empty = {"input_ids": [[3, 4, 5]], "labels": [[-100] * 3], "id": ["none"]}
    dataset = Dataset.from_dict({k: whole[k][:2] + empty[k] + whole[k][2:] for k in whole.column_names})
    train(tmp_path, model, dataset, num_train_epochs=1)
    table = pq.read_table(tmp_path / "run" / "scores.parquet")
    assert table["index"].to_pylist() == [0, 1, 3, 4, 5]
    rejected = (tmp_path / "run" / "rejected.jsonl").read_text()
    assert json.loads(rejected) == {"index": 2, "reason": "no token carries loss"}
    truth = [gradients_of(copy.deepcopy(model).double(), rows, i)[HEAD].norm().item() for i in range(5)]
    np.testing.assert_allclose(table["lm_head.norm"].to_numpy(), truth, rtol=IN_FLOAT32)


def test_chats_through_trl(tmp_path):
    """Tokenized by SFTTrainer itself: the table is about the rows of its prepared dataset."""
    tokenizer = make_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    chats = Dataset.from_list(make_rows(8))
    trainer = train(tmp_path, model, chats, SFTTrainer, assistant_only_loss=True)
    prepared = trainer.train_dataset
    rows = Rows(
        [np.array(row["input_ids"], dtype=np.int32) for row in prepared],
        [np.array(row["labels"]) != -100 for row in prepared],
    )
    assert sum(mask.sum() for mask in rows.masks) < sum(len(ids) for ids in rows.ids)
    table = check_table(tmp_path / "run" / "scores.parquet", model.double(), rows, DEFAULT, IN_FLOAT32)
    assert table["id"].to_pylist() == [f"row{i}" for i in range(8)]


class Stop(TrainerCallback):
    """Ends the training after a step."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True


def test_a_training_that_ends_early_is_not_disturbed(tmp_path, caplog):
    rows = Rows.random(NUM_ROWS)
    trainer = Trainer(
        tiny_model("llama"), arguments(tmp_path), train_dataset=dataset_of(rows), data_collator=collate
    )
    trainer.add_callback(ScoreTableCallback(trainer, tmp_path / "run"))
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 1
    assert "is missing (5 such rows)" in caplog.text
    assert not (tmp_path / "run" / "scores.parquet").exists()
    assert not hooks_of_ours(trainer.model)


def test_an_error_in_training_takes_the_hooks_off(tmp_path):
    trainer = Trainer(
        tiny_model("llama"),
        arguments(tmp_path),
        train_dataset=dataset_of(Rows.random(4)),
        data_collator=collate,
    )
    step = trainer.training_step

    def fail(model, inputs, *args):
        step(model, inputs, *args)
        raise RuntimeError("the user's own")

    trainer.training_step = fail
    trainer.add_callback(ScoreTableCallback(trainer, tmp_path / "run"))
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer.train()
    assert not hooks_of_ours(trainer.model)


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("the user's own")


def test_a_training_after_one_that_failed_elsewhere(tmp_path):
    """The callback hears of no error outside its step; the next training must not be read twice."""
    rows = Rows.random(NUM_ROWS)
    trainer = Trainer(
        tiny_model("llama"), arguments(tmp_path), train_dataset=dataset_of(rows), data_collator=collate
    )
    trainer.add_callback(ScoreTableCallback(trainer, tmp_path / "run"))
    trainer.add_callback(Fail())
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer.train()
    trainer.remove_callback(Fail)
    trainer.train()
    assert pq.read_table(tmp_path / "run" / "scores.parquet").num_rows == NUM_ROWS
    assert not hooks_of_ours(trainer.model)


def test_a_dataset_that_is_exchanged_before_training(tmp_path):
    trainer = Trainer(
        tiny_model("llama"),
        arguments(tmp_path),
        train_dataset=dataset_of(Rows.random(NUM_ROWS)),
        data_collator=collate,
    )
    trainer.add_callback(ScoreTableCallback(trainer, tmp_path / "run"))
    trainer.train_dataset = dataset_of(Rows.random(4))
    trainer.train()
    assert pq.read_table(tmp_path / "run" / "scores.parquet").num_rows == 4
