"""What the ranks of test_library_ranks.py do: read other people's distributed passes, in one process group.

    torchrun --nproc-per-node 2 tests/distributed/library_worker.py FOLDER

Every case compares with the oracle, and raises where it differs; one that passed leaves a file of its name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from library_cases import batch_of, check, check_table, collate, dataset_of, gradients_of
from peft import LoraConfig, get_peft_model
from tiny import Rows, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from workspace import make_tokenizer

import grads_dist
from grads_dist.errors import ConfigError, GradsDistError

IN_FLOAT32, THROUGH_FLOAT32 = 2e-5, 5e-6
IN_BFLOAT16 = 0.1
"""Weights and activations with 8 bits, through two layers: about 2 % of a norm, more of one element."""
TARGETS = ["embedding", "lm_head", "layers", "norms"]
ROWS = Rows.random(11)
FOLDER = Path(sys.argv[1])
"""With 2 ranks of batches of 3, accelerate fills the last batches up with rows of the first."""


def own_rows() -> list[int]:
    """The rows of this rank, of which there are 4 and 3."""
    return [[0, 1, 2, 3], [4, 5, 6]][dist.get_rank()]


def oracle(model: nn.Module) -> list[dict]:
    return [gradients_of(copy.deepcopy(model).double(), ROWS, i) for i in own_rows()]


def ddp() -> None:
    model = tiny_model("llama").double()
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    with grads_dist.record(wrapped, TARGETS) as recording:
        (7 * wrapped(**batch_of(ROWS, own_rows())).loss).backward()
    check(recording.statistics(), recording.targets, oracle(model), THROUGH_FLOAT32)


def ddp_adapters() -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    peft_model = get_peft_model(tiny_model("llama").double(), lora)
    base = copy.deepcopy(peft_model).get_base_model().double().requires_grad_(True)
    wrapped = DistributedDataParallel(peft_model.double())
    with grads_dist.record(wrapped, ["adapters", "lm_head"]) as recording:
        wrapped(**batch_of(ROWS, own_rows())).loss.backward()
    check(recording.statistics(), recording.targets, oracle(base), THROUGH_FLOAT32)


def accelerated() -> None:
    """With accumulation: accelerate divides every micro-batch's loss."""
    model = tiny_model("llama")
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    ours = copy.deepcopy(model)
    prepared, optimizer = accelerator.prepare(ours, torch.optim.SGD(ours.parameters(), lr=0.0))
    with grads_dist.record(prepared, TARGETS) as recording:
        for _ in range(2):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch_of(ROWS, own_rows())).loss)
                optimizer.step()
            check(recording.statistics(), recording.targets, oracle(model), IN_FLOAT32)


def zero(stage: int, architecture: str) -> Callable[[], None]:
    def case() -> None:
        model = tiny_model(architecture)
        truth = oracle(model)
        tied = ["tied"] if architecture == "gpt2" else []
        engine, *_ = deepspeed.initialize(
            model=copy.deepcopy(model), model_parameters=None, config=zero_config(stage, train=True)
        )
        with grads_dist.record(engine, [*TARGETS, *tied]) as recording:
            for _ in range(2):
                engine.backward(engine(**batch_of(ROWS, own_rows())).loss)
                engine.step()
                check(recording.statistics(), recording.targets, truth, IN_FLOAT32)

    return case


def zero_config(stage: int, train: bool = False) -> dict:
    # By default stage 3 keeps weights below 10^5 elements whole on every rank: all of a tiny model.
    partition = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    config = {
        "zero_optimization": {"stage": stage, **partition},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0, "torch_adam": True}},
        "train_micro_batch_size_per_gpu": 1 if train else "auto",
        "gradient_accumulation_steps": 2 if train else "auto",
    }
    return config if train else config | {"train_batch_size": "auto"}


def bfloat16(stage: int) -> dict:
    return zero_config(stage) | {"bf16": {"enabled": True}}


def trained(
    kind: type[Trainer], name: str, architecture: str = "llama", **options: object
) -> Callable[[], None]:
    """A Trainer's run with the callback; the first rank checks the merged table."""

    def case() -> None:
        sft = kind is SFTTrainer
        args = (SFTConfig if sft else TrainingArguments)(
            output_dir=str(FOLDER / "trainer"),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **({"bf16": False} | options),
        )
        extra = {"processing_class": make_tokenizer()} if sft else {"data_collator": collate}
        model = tiny_model(architecture)
        trainer = kind(copy.deepcopy(model), args, train_dataset=dataset_of(ROWS), **extra)
        tied = architecture == "gpt2"
        wanted = ["embedding", "lm_head"] + (["tied"] if tied else [])
        trainer.add_callback(grads_dist.ScoreTableCallback(trainer, FOLDER / name, targets=wanted))
        trainer.train()
        wrapper = "DeepSpeedEngine" if "deepspeed" in options else "DistributedDataParallel"
        assert type(trainer.model_wrapped).__name__ == wrapper
        embedding = "transformer.wte.weight" if tied else "model.embed_tokens.weight"
        names = {"embedding": [embedding], "lm_head": ["lm_head.weight"]}
        names |= {"tied": ["tied embedding and LM head"]} if tied else {}
        if dist.get_rank() == 0:
            bound = IN_BFLOAT16 if options.get("bf16") else IN_FLOAT32
            check_table(FOLDER / name / "scores.parquet", model.double(), ROWS, names, bound)

    return case


def sharded() -> None:
    """FSDP and tensor parallelism are refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fsdp = tiny_model("llama")
    fully_shard(fsdp, mesh=mesh)
    tensors = tiny_model("llama")
    parallelize_module(tensors.lm_head, mesh, ColwiseParallel())
    for model, message in ((fsdp, "FSDP"), (tensors, "tensor parallelism")):
        try:
            grads_dist.Recording(model, ["embedding"])
        except ConfigError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{message} was not refused")


def one_rank_fails() -> None:
    """A folder that cannot be used is found by the first rank, and all of them raise."""
    args = TrainingArguments(output_dir=str(FOLDER / "trainer"), use_cpu=True, report_to=[])
    trainer = Trainer(tiny_model("llama"), args, train_dataset=dataset_of(ROWS), data_collator=collate)
    missing = FOLDER / "nothing.jsonl"
    trainer.add_callback(grads_dist.ScoreTableCallback(trainer, FOLDER / "failed", corpus=missing))
    try:
        trainer.train()
    except GradsDistError as error:
        assert "nothing.jsonl" in str(error)
    else:
        raise AssertionError("nothing was raised")


CASES: dict[str, Callable[[], None]] = {
    "ddp": ddp,
    "ddp_adapters": ddp_adapters,
    "sharded": sharded,
    "trainer": trained(Trainer, "trainer"),
    "trainer_rank_means": trained(Trainer, "trainer_rank_means", average_tokens_across_devices=False),
    "trainer_recomputation": trained(Trainer, "trainer_recomputation", "gpt2", gradient_checkpointing=True),
    "sft": trained(SFTTrainer, "sft"),
    "one_rank_fails": one_rank_fails,
    "accelerated": accelerated,
    "zero0": zero(0, "llama"),
    "zero1": zero(1, "llama"),
    "zero2": zero(2, "gpt2"),
    "zero3": zero(3, "llama"),
    "zero3_tied": zero(3, "gpt2"),
    "trainer_zero2": trained(Trainer, "trainer_zero2", deepspeed=zero_config(2)),
    "trainer_zero3": trained(Trainer, "trainer_zero3", deepspeed=zero_config(3)),
    "sft_zero3_bfloat16": trained(SFTTrainer, "sft_zero3_bfloat16", bf16=True, deepspeed=bfloat16(3)),
    "trainer_zero2_bfloat16": trained(Trainer, "trainer_zero2_bfloat16", bf16=True, deepspeed=bfloat16(2)),
    "sft_zero3": trained(SFTTrainer, "sft_zero3", deepspeed=zero_config(3)),
}


def main() -> None:
    dist.init_process_group("gloo")
    chosen = sys.argv[2].split(",") if len(sys.argv) > 2 else CASES
    for name in chosen:
        CASES[name]()
        dist.barrier()
        if dist.get_rank() == 0:
            (FOLDER / f"{name}.passed").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
