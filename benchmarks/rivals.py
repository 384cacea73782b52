"""Per-sample gradients by other people's packages: opacus and bergson, each as its documentation has it used.

Both give gradients as whole tensors [S, ...]; the numbers of each are then taken with torch. Four reductions
are made of every gradient: the standard deviation follows from sum and norm.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from per_sample import by_target, numbers_of_all
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from variants import LINEAR, Setup, Step, model_and_targets, plain_loss
from workload import Work

from grads_dist.model.load import load_model
from grads_dist.model.probed import Batch
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import Targets

PROJECTION_DIM = 16
"""Sides of bergson's projections of a layer: its default."""


def versions(*packages: str) -> dict[str, str | None]:
    """Of the packages that are installed; None for the others."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def plain_passes(setup: Setup) -> Step:
    """Forward and backward pass in plain torch, all weights with gradients, no update."""
    model = load_model(setup.model_config, setup.torch_dtype, setup.ranks.device)
    parameters = [p.requires_grad_(True) for p in model.parameters()]

    def step(work: Work) -> None:
        plain_loss(model, work.batch).backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def sum_of_sample_means(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over the samples of each one's mean cross-entropy, so that its gradient is that of its own loss."""
    labels_ST = _labels(batch)[:, 1:]
    output = model(input_ids=batch.input_ids, attention_mask=batch.token_mask.long(), use_cache=False)
    logits_ZV = output.logits[:, :-1].flatten(0, 1)
    nll = cross_entropy(logits_ZV, labels_ST.flatten(), ignore_index=-100, reduction="none")
    counts_S = (labels_ST != -100).sum(1)
    return (nll.view_as(labels_ST).sum(1) / counts_S).sum()


def _labels(batch: Batch) -> Tensor:
    return batch.input_ids.masked_fill(~batch.loss_mask, -100)


def opacus_gradients(setup: Setup, targets: list[str]) -> Step:
    """opacus' hooks, which put the gradients of all samples beside each weight, then the numbers of each."""
    from opacus.grad_sample import GradSampleModule

    return _opacus(GradSampleModule, lambda weight: numbers_of_all(weight.grad_sample), setup, targets)


def opacus_norms(setup: Setup, targets: list[str]) -> Step:
    """opacus' ghost norms: Gram matrices of tokens by tokens, no gradient of a sample is formed."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    return _opacus(
        GradSampleModuleFastGradientClipping, lambda weight: _only_norm(weight._norm_sample), setup, targets
    )


def _opacus(hooks: Any, read: Callable[[Any], Tensor], setup: Setup, targets: list[str]) -> Step:
    """A step under opacus' hooks; `read` gives the numbers of what they leave beside a weight."""
    model, resolved = model_and_targets(setup, targets)
    wanted = _train_only(model, resolved)
    hooked = hooks(model, loss_reduction="sum", strict=False)

    def step(work: Work) -> dict[str, Statistics]:
        sum_of_sample_means(hooked, work.batch).backward()
        numbers = {name: read(weight) for name, weight in wanted.items()}
        hooked.zero_grad(set_to_none=True)
        return by_target(numbers, resolved)

    return step


def _train_only(model: nn.Module, targets: Targets) -> dict[str, Any]:
    model.requires_grad_(False)
    return {name: model.get_parameter(name).requires_grad_(True) for name in sorted(targets.parameters)}


def _only_norm(norm_S: Tensor) -> Tensor:
    unknown = torch.full_like(norm_S, torch.nan, dtype=torch.float64)
    return torch.stack([unknown, norm_S.double().square(), unknown, unknown], 1)


def bergson_store(setup: Setup) -> Step:
    """bergson's index: every layer's gradients projected to 16 x 16 and written to disk."""
    run = _bergson(setup, {}, projection_dim=PROJECTION_DIM)

    def step(work: Work) -> None:
        run(work.batch)

    return step


def bergson_statistics(setup: Setup) -> Step:
    """bergson's whole gradients, reduced in each layer's hook as its documentation does for summaries."""
    from bergson.collector.collector import HookCollectorBase
    from bergson.collector.gradient_collectors import GradientCollector

    found: dict[str, Tensor] = {}

    class Collector(GradientCollector):
        """Keeps numbers instead of gradients."""

        @HookCollectorBase.split_attention_heads
        def backward_hook(self, module: Any, g: Tensor) -> None:
            flat_SN = self._compute_gradient(module, g)
            found[module._name] = numbers_of_all(flat_SN.unflatten(1, module.weight.shape))

    run = _bergson(setup, {"skip_index": True}, Collector, projection_dim=0)
    targets = model_and_targets(setup, LINEAR)[1]

    def step(work: Work) -> dict[str, Statistics]:
        found.clear()
        run(work.batch)
        numbers = {f"model.{name}.weight": values for name, values in found.items()}
        return by_target(numbers, _within(targets, numbers))

    return step


def _within(targets: Targets, parameters: Mapping[str, object]) -> Targets:
    members = {name: held for name, held in targets.members.items() if set(held) <= set(parameters)}
    return Targets(members, {name: targets.numel[name] for name in members})


def _bergson(
    setup: Setup, options: dict[str, Any], collector: Any = None, **config: Any
) -> Callable[[Batch], None]:
    """bergson's model, collector and passes, on our batches."""
    from bergson.collector.collector import fwd_bwd_factory
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config.config import DataConfig, IndexConfig, PreprocessConfig
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft
    from datasets import Dataset

    folder = tempfile.TemporaryDirectory()
    cfg = IndexConfig(
        run_path=str(Path(folder.name, "index")),
        model=setup.model_folder,
        token_batch_size=setup.batch_tokens,
        precision={"float32": "fp32", "bfloat16": "bf16"}[setup.dtype],
        loss_reduction="mean",
        data=DataConfig(dataset="unread"),
        **config,
    )
    cfg.partial_run_path.mkdir(parents=True)
    model, modules = setup_model_and_peft(cfg)
    collect = (collector or GradientCollector)(
        model=model.base_model,
        cfg=cfg,
        processor=create_processor(model, cfg, modules),
        target_modules=modules,
        data=Dataset.from_dict({"row": range(setup.num_rows)}),
        preprocess_cfg=PreprocessConfig(),
        **options,
    )
    passes = fwd_bwd_factory(cfg)

    # The folder goes when the function does.
    def run(batch: Batch, folder: object = folder) -> None:
        with collect.with_batch(None):
            losses = passes(model, batch.input_ids, _labels(batch), {})
        collect.process_batch(batch.rows.tolist(), losses=losses)

    return run
