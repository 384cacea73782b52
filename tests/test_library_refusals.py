"""What cannot be read is refused by name, before any number is given."""

from __future__ import annotations

import types

import pytest
import torch
from datasets import IterableDataset
from library_cases import batch_of, collate, dataset_of
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_library_callback import arguments
from tiny import Rows, tiny_model
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer
from trl import SFTConfig, SFTTrainer
from workspace import make_tokenizer

import grads_dist
from grads_dist.errors import ConfigError


def pass_over(model: nn.Module, batch: dict, targets=("embedding", "lm_head")) -> None:
    with grads_dist.record(model, targets) as recording:
        model(**batch).loss.backward()
        recording.statistics()


BATCHES = {
    "position_ids that restart": {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 5])},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1]])},
    "attention_mask": {"attention_mask": torch.tensor([[1, 1, 1, 2, 2]])},
    "attention_mask is not": {"attention_mask": torch.ones(1, 1, 5, 5)},
    "shift_labels": {"shift_labels": torch.zeros(1, 5, dtype=torch.long)},
    "a label is predicted from padding": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
    "output_router_logits": {"output_router_logits": True},
    "allowed: return_dict=True": {"return_dict": False},
}


@pytest.mark.parametrize("message", BATCHES)
def test_batches(message):
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with pytest.raises(ConfigError, match=message):
        pass_over(tiny_model("llama"), {"input_ids": ids, "labels": ids, **BATCHES[message]})


def test_a_router_balance_loss():
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="output_router_logits: the router's balance loss"):
        pass_over(model, batch_of(Rows.random(3)))


FURTHER_TERMS = {
    "distillation": lambda logits: 0.5 * logits.log_softmax(-1)[..., 7].mean(),
    "z-loss": lambda logits: logits.logsumexp(-1).square().mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FURTHER_TERMS)
def test_a_further_term_of_the_logits(name, dtype):
    model, batch = tiny_model("llama").to(dtype), batch_of(Rows.random(4))
    with grads_dist.record(model, ["lm_head"]) as recording:
        output = model(**batch)
        (8 * output.loss / 3).backward()  # itself by any factor
        recording.statistics()
    with pytest.raises(ConfigError, match="something else is computed of them, such as a distillation"):
        with grads_dist.record(model, ["lm_head"]):
            output = model(**batch)
            (output.loss + FURTHER_TERMS[name](output.logits)).backward()


def test_a_loss_of_the_models_own():
    """Found by value, whatever it is."""
    model = tiny_model("llama")
    own = model.loss_function
    model.loss_function = lambda *args, **kwargs: 1.001 * own(*args, **kwargs)
    with pytest.raises(ConfigError, match="something else is in it, such as a router's balance loss"):
        pass_over(model, batch_of(Rows.random(3)))


class OptimizedOnly(nn.Module):
    """Compiled in place, as `module.compile()` does it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.compile()


class FSDPModule(nn.Module):
    """Named as the class that `fully_shard` mixes into a module."""


class PipelineEngine(nn.Module):
    """Named as DeepSpeed's."""


class DeepSpeedEngine(nn.Module):
    """Named as DeepSpeed's, with Ulysses on."""

    sequence_parallel_size = 2


def liger() -> nn.Module:
    model = tiny_model("llama")

    def lce_forward(self: nn.Module) -> None: ...

    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = types.MethodType(lce_forward, model)
    return model


def prompt_tuning() -> nn.Module:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(tiny_model("llama"), config)


def with_adapter(*modules: str, **options) -> nn.Module:
    return get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", *modules], **options))


MODELS = {
    "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "torch.compile, whose graph": lambda: torch.compile(nn.Linear(2, 2)),
    "inner is compiled": OptimizedOnly,
    "FSDP; allowed": FSDPModule,
    "pipeline parallelism": PipelineEngine,
    "sequence parallelism": DeepSpeedEngine,
    "Liger": liger,
    "PROMPT_TUNING": prompt_tuning,
    # Else it would be a module like any other, whose labels and padding mean nothing.
    "LM head of type peft.*ModulesToSaveWrapper": lambda: with_adapter(modules_to_save=["lm_head"]),
    "LM head of type peft.*lora": lambda: with_adapter("lm_head"),
}


@pytest.mark.parametrize("message", MODELS)
def test_models(message):
    model = MODELS[message]()
    with pytest.raises(ConfigError, match=message), grads_dist.record(model, {"all": ".*"}):
        pass


def test_targets():
    with pytest.raises(ConfigError, match="^targets: 'all' holds weight, and Conv1d has no rule"):
        grads_dist.Recording(nn.Conv1d(2, 2, 1), {"all": ".*"})
    with pytest.raises(ConfigError, match="'embedding' needs a causal language model"):
        grads_dist.Recording(nn.Sequential(nn.Linear(2, 2)), ["embedding"])


def test_batch_axes():
    model = nn.Sequential(nn.Linear(3, 3))
    with grads_dist.record(model, {"all": ".*"}), pytest.raises(ConfigError, match="4 samples of 4 tokens"):
        model(torch.ones(4, 4, 3))
    with grads_dist.record(model, {"all": ".*"}), pytest.raises(ConfigError, match="without a tensor"):
        model(None)


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).logits.square().mean()


TRAINERS = {
    "drop_last": (Trainer, {"dataloader_drop_last": True}, {}),
    "dispatch_batches": (Trainer, {"accelerator_config": {"dispatch_batches": True}}, {}),
    "label_smoothing_factor": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": (Trainer, {}, {"compute_loss_func": lambda *args, **kwargs: 0}),
    "OwnLoss has a compute_loss": (OwnLoss, {}, {}),
    "torch_compile": (Trainer, {"torch_compile": True}, {}),
    "auto_find_batch_size": (Trainer, {"auto_find_batch_size": True}, {}),
    "use_liger_kernel": (Trainer, {"use_liger_kernel": True}, {}),
    "packs samples": (Trainer, {}, {"data_collator": DataCollatorWithFlattening()}),
    "packing puts": (SFTTrainer, {"packing": True, "packing_strategy": "wrapped"}, {}),
    "padding_free": (SFTTrainer, {"padding_free": True, "max_length": None}, {}),
    "loss_type='dft'": (SFTTrainer, {"loss_type": "dft"}, {}),
}


def trainer_of(tmp_path, kind=Trainer, options=None, extra=None, dataset=None):
    sft = issubclass(kind, SFTTrainer)
    args = arguments(tmp_path, SFTConfig if sft else arguments.__defaults__[0], **(options or {}))
    defaults = {"processing_class": make_tokenizer()} if sft else {"data_collator": collate}
    dataset = dataset_of(Rows.random(7)) if dataset is None else dataset
    return kind(tiny_model("llama"), args, train_dataset=dataset, **(defaults | (extra or {})))


@pytest.mark.parametrize("message", TRAINERS)
@pytest.mark.filterwarnings("ignore")
def test_trainers(tmp_path, message):
    kind, options, extra = TRAINERS[message]
    trainer = trainer_of(tmp_path, kind, {"bf16": False} | options, extra)
    step = trainer.training_step
    with pytest.raises(ConfigError, match=f"ScoreTableCallback: .*{message}"):
        grads_dist.ScoreTableCallback(trainer, tmp_path / "run")
    assert trainer.training_step == step and not (tmp_path / "run").exists()


def test_datasets_without_row_numbers(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": [1, 2], "labels": [1, 2]}]))
    trainer = trainer_of(tmp_path, options={"max_steps": 1}, dataset=stream)
    with pytest.raises(ConfigError, match="train_dataset is a IterableDataset"):
        grads_dist.ScoreTableCallback(trainer, tmp_path / "run")


def test_rows_that_are_no_dictionaries(tmp_path):
    rows = [(torch.tensor([1, 2]), torch.tensor([1, 2]))]
    trainer = Trainer(tiny_model("llama"), arguments(tmp_path), train_dataset=rows, data_collator=collate)
    trainer.add_callback(grads_dist.ScoreTableCallback(trainer, tmp_path / "run"))
    with pytest.raises(ConfigError, match="rows of train_dataset are of type tuple"):
        trainer.train()


def test_a_callback_belongs_to_one_trainer(tmp_path):
    rows = dataset_of(Rows.random(4))
    first, second = (
        Trainer(tiny_model("llama"), arguments(tmp_path), train_dataset=rows, data_collator=collate)
        for _ in range(2)
    )
    callback = grads_dist.ScoreTableCallback(first, tmp_path / "run")
    with pytest.raises(ConfigError, match="the trainer has one already"):
        grads_dist.ScoreTableCallback(first, tmp_path / "other")
    second.add_callback(callback)
    with pytest.raises(ConfigError, match="added to another trainer than it was made for"):
        second.train()


def test_epochs_that_are_not_whole(tmp_path):
    trainer = trainer_of(tmp_path, options={"max_steps": 1})
    trainer.add_callback(grads_dist.ScoreTableCallback(trainer, tmp_path / "run"))
    with pytest.raises(
        ConfigError, match="max_steps 1 ends before the first epoch does; allowed: at least 2"
    ):
        trainer.train()
    trainer = trainer_of(tmp_path, options={"save_strategy": "steps", "save_steps": 1})
    trainer.train()
    trainer = trainer_of(tmp_path, options={"num_train_epochs": 3})
    trainer.add_callback(grads_dist.ScoreTableCallback(trainer, tmp_path / "run"))
    with pytest.raises(ConfigError, match="resumes from a checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_an_earlier_run_stays_until_all_is_known_to_be_well(tmp_path):
    for targets in (["lm_head"], ["lm_heads"]):
        trainer = trainer_of(tmp_path)
        table = grads_dist.ScoreTableCallback(trainer, tmp_path / "run", targets=targets, overwrite=True)
        trainer.add_callback(table)
        if targets == ["lm_head"]:
            trainer.train()
            continue
        with pytest.raises(ConfigError, match="^targets: 'lm_heads' is not known"):
            trainer.train()
    assert (tmp_path / "run" / "scores.parquet").exists()


def test_a_folder_with_a_run(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(grads_dist.ScoreTableCallback(trainer, tmp_path / "run"))
    trainer.train()
    with pytest.raises(ConfigError, match="holds a run already"):
        grads_dist.ScoreTableCallback(trainer, tmp_path / "run")
    grads_dist.ScoreTableCallback(trainer, tmp_path / "run", overwrite=True)
