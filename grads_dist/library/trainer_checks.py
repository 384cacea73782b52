"""What a trainer is set to do that the score table cannot follow; found before any work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from grads_dist.errors import ConfigError


def check_trainer(trainer: Any) -> None:
    """Raise ConfigError naming the first option under which rows, samples or losses cannot be read."""
    for fault in _faults(trainer):
        raise ConfigError(f"ScoreTableCallback: {fault}")


def _faults(trainer: Any) -> Iterator[str]:
    if hasattr(getattr(trainer.training_step, "__self__", None), "on_train_begin"):
        yield "the trainer has one already; allowed: one, with all targets"
    yield from _data_faults(trainer)
    yield from _loss_faults(trainer)
    yield from _parallelism_faults(trainer)


def _data_faults(trainer: Any) -> Iterator[str]:
    args, dataset = trainer.args, trainer.train_dataset
    if dataset is None:
        yield "the trainer has no train_dataset"
    elif not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        yield f"train_dataset is a {type(dataset).__name__}, which numbers no rows; allowed: one with length"
    if getattr(args, "packing", False):
        yield "packing puts several samples into a row; allowed: packing=False"
    if getattr(args, "padding_free", False) or getattr(trainer.data_collator, "padding_free", False):
        yield "padding_free puts several samples into a row; allowed: padding_free=False"
    if hasattr(trainer.data_collator, "return_flash_attn_kwargs"):
        yield f"{type(trainer.data_collator).__name__} packs samples into a row; allowed: one that pads"
    if args.accelerator_config.dispatch_batches:
        yield "dispatch_batches cuts batches on one rank for all; allowed: False"
    if args.dataloader_drop_last:
        yield "dataloader_drop_last loses the last rows; allowed: dataloader_drop_last=False"


def _loss_faults(trainer: Any) -> Iterator[str]:
    args = trainer.args
    if trainer.compute_loss_func is not None:
        yield "compute_loss_func: the loss is not the model's own; allowed: none"
    if args.label_smoothing_factor:
        yield "label_smoothing_factor changes the loss; allowed: 0"
    if getattr(args, "loss_type", "nll") != "nll":
        yield f"loss_type={args.loss_type!r} weighs the tokens of a sample differently; allowed: 'nll'"
    if not _is_known_loss(trainer.compute_loss):
        yield f"{type(trainer).__name__} has a compute_loss of its own; allowed: Trainer's or SFTTrainer's"
    if getattr(trainer, "aux_loss_enabled", False):
        yield "the router's balance loss couples the samples of a batch; allowed: router_aux_loss_coef=0.0"
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        yield "use_liger_kernel replaces the LM head; allowed: without fused_linear_cross_entropy"


def _parallelism_faults(trainer: Any) -> Iterator[str]:
    args = trainer.args
    if args.n_gpu > 1:
        yield "DataParallel over the GPUs of one process cannot be read; start one process a GPU (torchrun)"
    if trainer.is_fsdp_enabled:
        yield "FSDP cannot be read; allowed: DDP, or DeepSpeed with ZeRO stage 0 to 3"
    if args.torch_compile:
        yield "torch_compile: every layer that is read breaks its graph; allowed: torch_compile=False"
    if args.auto_find_batch_size:
        yield "auto_find_batch_size starts the epoch again, with rows twice; allowed: a fixed batch size"
    sizes = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
    if max(sizes) > 1:
        yield "tensor, context and sequence parallelism cannot be read: no rank sees a whole sample"


def _is_known_loss(method: Any) -> bool:
    """Whether this is the `compute_loss` of Trainer or SFTTrainer; one that replaces it may do anything."""
    function = inspect.unwrap(getattr(method, "__func__", method))
    known = ("transformers.trainer.Trainer", "trl.trainer.sft_trainer.SFTTrainer")
    return f"{function.__module__}.{function.__qualname__}" in [f"{name}.compute_loss" for name in known]
