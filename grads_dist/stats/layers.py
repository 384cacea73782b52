"""Attaches to a model's layers and hands out per-sample gradients of their parameters as they come by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.stats import ops
from grads_dist.stats.capture import captured, tap_call, tap_output
from grads_dist.stats.experts import Routed, expert_gradients, is_fused_experts, watch_experts
from grads_dist.stats.gradients import OuterProduct, SampleGradient, Zero
from grads_dist.stats.routed import RoutedModules
from grads_dist.stats.rules import Rule, rule_for
from grads_dist.stats.segments import BatchLayout, PackedLayout
from grads_dist.stats.shared import can_share, share_gradient

Consumer = Callable[[str, SampleGradient], None]
"""Takes a qualified parameter name and the per-sample gradients that one backward pass gave it."""


class LayerReader:
    """Per-sample gradients of chosen parameters, one batch at a time.

    `with reader.batch(layout):` goes around the forward and backward pass of a batch; within the backward
    pass `consume` is called once for each parameter. Nothing of a gradient outlives that call.

    Args:
        model: attach before DeepSpeed wraps it where possible; afterwards works too.
        parameters: qualified names, of parameters that `rule_for` or the fused experts know.
        consume: what takes the gradients.
        share: sum the weight gradients of linear layers that are trained from the same products.
    """

    def __init__(
        self, model: nn.Module, parameters: Iterable[str], consume: Consumer, share: bool = False
    ) -> None:
        self._model, self._consume, self._share = model, consume, share
        self._layout: BatchLayout | None = None
        self._seen: set[tuple[str, str]] = set()
        self._checked: set[str] = set()
        self._wanted: dict[str, set[str]] = {}
        for parameter in sorted(parameters):
            owner, _, local = parameter.rpartition(".")
            self._wanted.setdefault(owner, set()).add(local)
        self._routed = RoutedModules(model, self._wanted, self._active)
        self._undo = [undo for name in self._wanted for undo in self._attach(name)]

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules that are read."""
        return frozenset(self._wanted)

    @contextmanager
    def batch(self, layout: BatchLayout) -> Iterator[None]:
        """Read the passes inside the block as those of one batch."""
        self._layout, self._seen = layout, set()
        try:
            yield
        finally:
            self._layout = None
            self._routed.forget()

    def complete(self, zero: Zero) -> None:
        """Hand out `zero` for the experts that no token of the last batch reached.

        Raises ConfigError naming any other parameter that its backward pass did not reach.
        """
        for name, wanted in self._wanted.items():
            for local in sorted(wanted):
                if (name, local) in self._seen:
                    continue
                if not self._routed.may_be_idle(name):
                    raise ConfigError(
                        f"probe.targets: no gradient reached {name}.{local} in the backward pass"
                    )
                self._consume(_qualified(name, local), zero)

    def detach(self) -> None:
        """Leave the model as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self._routed.detach()

    def _active(self) -> bool:
        return self._layout is not None

    def _attach(self, name: str) -> Iterator[Callable[[], None]]:
        module = self._model.get_submodule(name)
        if is_fused_experts(module):
            yield watch_experts(module, lambda: partial(self._take_experts, name) if self._active() else None)
            return
        # Weights first: where a layer's gradient is shared, its bias is read in the same place.
        rules = {local: rule_for(module, local) for local in sorted(self._wanted[name], reverse=True)}
        attached: list[Rule] = []
        for local, rule in rules.items():
            assert rule is not None
            if any(rule.gradients is other.gradients for other in attached):
                continue
            attached.append(rule)
            tap = partial(self._tap, name, module, rule)
            if self._share and local == "weight" and can_share(module) and not self._routed.may_be_idle(name):
                sink = partial(self._take_shared, name, module, rule)
                yield share_gradient(module, sink, tap, self._active)
            elif rule.call is None:
                yield tap_output(module, tap)
            else:
                yield tap_call(module, rule.call, getattr(module, local), tap, self._active)

    def _tap(
        self, name: str, module: nn.Module, rule: Rule, layer_input: Tensor, output: Tensor
    ) -> Tensor | None:
        layout = self._layout
        if layout is None:
            return None
        # Layer by layer: one class may compute different things, as its instances are told to.
        if rule.check is not None and name not in self._checked and output.numel():
            with torch.no_grad():
                fits = rule.check(module, layer_input, output)
            if not fits:
                raise ConfigError(
                    f"probe.targets: {name} ({type(module).__name__}) does not compute what a layer of its "
                    f"kind does, and has no rule; leave it out with a pattern"
                )
            self._checked.add(name)
        if isinstance(module, nn.Embedding) and layer_input.shape[0] == 1 < layout.num_samples:
            # One row of positions for all samples: each gets its own, as broadcasting would give it.
            layer_input = layer_input.expand(layout.num_samples, *layer_input.shape[1:])
            output = output.expand(layout.num_samples, *output.shape[1:])
        rows = self._routed.rows_of(name)
        return captured(layer_input, output, partial(self._take, name, module, rule, rows))

    def _take(
        self, name: str, module: nn.Module, rule: Rule, rows: Tensor | None, a: Tensor, b: Tensor
    ) -> None:
        if self._layout is None:
            return
        layout = self._layout
        if rows is not None:
            order, segments = layout.pack_groups(rows, torch.zeros_like(rows), 1)
            a, b = (x.reshape(-1, x.shape[-1]).index_select(0, order) for x in (a, b))
            layout = PackedLayout(segments)
        self._give(name, self._gradients(name, rule, module, a, b, layout))

    def _gradients(
        self, name: str, rule: Rule, module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout
    ) -> dict[str, SampleGradient]:
        try:
            found = rule.gradients(module, a, b, layout)
        except ValueError as error:
            raise ConfigError(f"probe.targets: {name}: {error}") from None
        return {local: gradient for local, gradient in found.items() if local in rule.parameters}

    def _take_shared(self, name: str, module: nn.Module, rule: Rule, a: Tensor, b: Tensor) -> Tensor:
        dtype = ops.accumulation_dtype(b.dtype)
        total = torch.zeros(b.shape[-1], a.shape[-1], dtype=dtype, device=b.device)
        layout = self._layout
        assert layout is not None, "the backward pass belongs inside `batch`"
        found = self._gradients(name, rule, module, a, b, layout)
        weight = found["weight"]
        assert isinstance(weight, OuterProduct)
        shared = replace(weight, batch=ops.BatchGradient(total))
        self._give(name, {**found, "weight": shared})
        shared.add_to_batch()
        return total

    def _take_experts(self, name: str, parameter: str, a: Tensor, b: Tensor, routed: Routed) -> None:
        if self._layout is not None:
            self._give(name, expert_gradients(parameter, a, b, routed, self._layout))

    def _give(self, name: str, found: dict[str, SampleGradient]) -> None:
        for local, gradient in found.items():
            if local not in self._wanted[name]:
                continue
            if (name, local) in self._seen:
                raise ConfigError(
                    f"probe.targets: {name} is used more than once in a pass, which has no rule"
                )
            self._seen.add((name, local))
            self._consume(_qualified(name, local), gradient)


def _qualified(module: str, parameter: str) -> str:
    """A parameter's whole name; that of the model itself is empty."""
    return f"{module}.{parameter}" if module else parameter
