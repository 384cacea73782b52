"""Per-sample gradient statistics without grads_dist: a batch-of-one autograd loop, and torch.func.

Both hold the whole gradient of a target in memory, the loop for one sample, torch.func for a chunk of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from grads_dist.model.probed import Batch
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import Targets


def gradient_numbers(g: Tensor) -> Tensor:
    """sum, sumsq, min, max of one finite gradient, float64 [4]."""
    minmax, wide = torch.aminmax(g), torch.promote_types(g.dtype, torch.float32)
    # Row by row first: one float32 sum of squares over all elements would lose five digits.
    rows = g.reshape(-1, g.shape[-1])
    sumsq = torch.linalg.vector_norm(rows, dim=1, dtype=wide).double().square().sum()
    return torch.stack([g.sum(dtype=wide).double(), sumsq, minmax.min.double(), minmax.max.double()])


def numbers_of_all(g_S: Tensor) -> Tensor:
    """The same of every sample's gradient [S, ...], [S, 4]."""
    return vmap(gradient_numbers)(g_S)


def by_target(numbers: dict[str, Tensor], targets: Targets) -> dict[str, Statistics]:
    """Statistics of every target from [S, 4] numbers of its parameters."""
    found = {}
    for name, parameters in targets.members.items():
        parts = [_as_statistics(numbers[p]) for p in parameters]
        found[name] = parts[0]
        for part in parts[1:]:
            found[name] = found[name].merge(part)
    return found


def _as_statistics(numbers_S4: Tensor) -> Statistics:
    total, sumsq, low, high = numbers_S4.unbind(1)
    return Statistics(total, sumsq, low, high, nonfinite=(~sumsq.isfinite()).to(torch.int64))


def loop_step(model: nn.Module, targets: Targets) -> Callable[[Batch], dict[str, Statistics]]:
    """A function from a batch to statistics: one forward and backward pass a sample, to the targets alone."""
    model.requires_grad_(False)
    wanted = {name: model.get_parameter(name).requires_grad_(True) for name in sorted(targets.parameters)}

    def one(ids_T: Tensor, mask_T: Tensor) -> list[Tensor]:
        logits = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
        loss = cross_entropy(logits[mask_T[1:]], ids_T[1:][mask_T[1:]])
        return [gradient_numbers(g) for g in torch.autograd.grad(loss, list(wanted.values()))]

    def step(batch: Batch) -> dict[str, Statistics]:
        lengths = batch.layout.segments.lengths
        rows = [one(batch.input_ids[s, :n], batch.loss_mask[s, :n]) for s, n in enumerate(lengths)]
        numbers = {
            name: torch.stack(column) for name, column in zip(wanted, zip(*rows, strict=True), strict=True)
        }
        return by_target(numbers, targets)

    return step


def vmap_step(
    model: nn.Module, targets: Targets, gradient_bytes: int
) -> Callable[[Batch], dict[str, Statistics]]:
    """A function from a batch to statistics by vmap(grad), with `gradient_bytes` of gradients at a time.

    Raises MemoryError when not even one sample's gradients fit.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wanted = {name: parameters.pop(name) for name in sorted(targets.parameters)}
    needed = sum(w.numel() * w.element_size() for w in wanted.values())
    if needed > gradient_bytes:
        raise MemoryError(f"one sample's gradients take {needed >> 20} MiB, more than {gradient_bytes >> 20}")

    def one(ids_T: Tensor, mask_T: Tensor) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            inputs = {"input_ids": ids_T[None], "use_cache": False}
            logits = functional_call(model, {**parameters, **weights}, (), inputs).logits[0, :-1]
            nll = cross_entropy(logits, ids_T[1:], reduction="none")
            return (nll * mask_T[1:]).sum() / mask_T[1:].sum()

        return {name: gradient_numbers(g) for name, g in grad(loss)(wanted).items()}

    batched = vmap(one, chunk_size=gradient_bytes // needed)

    def step(batch: Batch) -> dict[str, Statistics]:
        return by_target(batched(batch.input_ids, batch.loss_mask.float()), targets)

    return step
