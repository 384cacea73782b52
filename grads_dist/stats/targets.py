"""From the names and patterns a user gives to the parameters whose gradients are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import Anatomy
from grads_dist.stats.experts import expert_parameters, is_fused_experts
from grads_dist.stats.routed import expert_blocks
from grads_dist.stats.rules import is_quantised, is_rms_norm, rule_for

TIED = "tied embedding and LM head"
"""Stands for the one weight that is both embedding and head, with the sum of both gradients."""

NAMES = ("embedding", "lm_head", "tied", "layers", "linear", "experts", "norms", "biases", "adapters")


@dataclass(frozen=True)
class Targets:
    """What is read: for every target the qualified parameter names that it concatenates, and its size."""

    members: dict[str, tuple[str, ...]]
    numel: dict[str, int]

    @property
    def parameters(self) -> frozenset[str]:
        """All parameter names that some target needs."""
        return frozenset(name for names in self.members.values() for name in names)


def resolve_targets(wanted: Sequence[str] | Mapping[str, str], anatomy: Anatomy) -> Targets:
    """Resolve `probe.targets` against a model.

    Raises ConfigError for an unknown name, a pattern that matches nothing, a parameter whose layer type has
    no rule, or a parameter that several layers share.
    """
    sizes = _parameter_sizes(anatomy)
    if isinstance(wanted, Mapping):
        members = {name: _match(name, pattern, sizes, anatomy) for name, pattern in wanted.items()}
    else:
        members = {}
        for name in wanted:
            members.update(_builtin(name, sizes, anatomy))
    for name, parameters in members.items():
        _check_rules(name, parameters, anatomy)
    numel = {name: sum(sizes[p] for p in parameters) for name, parameters in members.items()}
    return Targets({name: tuple(parameters) for name, parameters in members.items()}, numel)


def _parameter_sizes(anatomy: Anatomy) -> dict[str, int]:
    """Elements of every parameter under every name it has; ZeRO-3 keeps the full size beside the shard."""
    sizes = {
        name: int(getattr(p, "ds_numel", p.numel()))
        for name, p in anatomy.model.named_parameters(remove_duplicate=False)
    }
    if anatomy.tied:
        sizes[TIED] = sizes[f"{anatomy.embedding_name}.weight"]
    return sizes


def _builtin(name: str, sizes: dict[str, int], anatomy: Anatomy) -> dict[str, list[str]]:
    """The targets that a name stands for; one a layer or module, or one for all that there is of a kind."""
    if name == "tied":
        if not anatomy.tied:
            raise ConfigError(
                "probe.targets: 'tied' needs a model whose embedding and LM head share one weight"
            )
        return {name: [TIED]}
    if name not in NAMES:
        raise ConfigError(
            f"probe.targets: {name!r} is not known; allowed: {', '.join(NAMES)}, or a map from names to "
            f"patterns"
        )

    def under(module: str) -> list[str]:
        return [p for p in sizes if p.startswith(module + ".")]

    if name in ("embedding", "lm_head"):
        return {name: under(anatomy.embedding_name if name == "embedding" else anatomy.head_name)}
    if name in _KINDS:
        found = {name: [p for p in sizes if p != TIED and _is_of_kind(name, p, anatomy)]}
    elif name == "linear":
        found = {module: under(module) for module in _linear_modules(anatomy)}
    else:
        owners = anatomy.layers if name == "layers" else _experts(anatomy)
        found = {f"{name}.{i}": under(owner) for i, owner in enumerate(owners)}
    if not any(found.values()):
        kind = type(anatomy.model).__name__
        raise ConfigError(f"probe.targets: {name!r} finds nothing of its kind in {kind}; use patterns")
    return found


_KINDS = ("norms", "biases", "adapters")


def _is_of_kind(kind: str, parameter: str, anatomy: Anatomy) -> bool:
    owner_name, _, local = parameter.rpartition(".")
    if kind == "biases":
        return owner_name != anatomy.head_name and (local == "bias" or local.endswith("_bias"))
    if kind == "adapters":
        return ".lora_" in parameter
    owner = anatomy.model.get_submodule(owner_name)
    return isinstance(owner, nn.LayerNorm) or is_rms_norm(owner)


def _linear_modules(anatomy: Anatomy) -> list[str]:
    return [
        name
        for name, module in anatomy.model.named_modules()
        if name != anatomy.head_name and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def _experts(anatomy: Anatomy) -> list[str]:
    """Names of what holds the experts of each layer that has some."""
    lists = [f"{name}.experts" for name in expert_blocks(anatomy.model)]
    return lists + [name for name, module in anatomy.model.named_modules() if is_fused_experts(module)]


def _match(name: str, pattern: str, sizes: dict[str, int], anatomy: Anatomy) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"probe.targets.{name}: {pattern!r} is not a regular expression: {error}") from None
    matched = [p for p in sizes if p != TIED and compiled.fullmatch(p)]
    if not matched:
        raise ConfigError(
            f"probe.targets.{name}: {pattern!r} matches no parameter; names look like {next(iter(sizes))!r}"
        )
    tied = {f"{anatomy.embedding_name}.weight", f"{anatomy.head_name}.weight"}
    if anatomy.tied and tied <= set(matched):
        # One weight under two names: its gradient is the sum of both uses and must enter once.
        matched = [p for p in matched if p not in tied] + [TIED]
    return matched


def _check_rules(target: str, parameters: Sequence[str], anatomy: Anatomy) -> None:
    shared = _shared_parameters(anatomy)
    inside = f"{anatomy.text_part}." if anatomy.text_part else ""
    special = {TIED, f"{anatomy.head_name}.weight", f"{anatomy.head_name}.bias"}
    for parameter in parameters:
        if parameter in special:
            continue
        owner_name, _, local = parameter.rpartition(".")
        fault = _adapter_fault(anatomy.model, parameter) or _fault(
            anatomy.model.get_submodule(owner_name), local
        )
        if fault is not None:
            raise ConfigError(f"probe.targets: {target!r} holds {parameter}, and {fault}")
        if not parameter.startswith(inside):
            raise ConfigError(
                f"probe.targets: {target!r} holds {parameter}, and what lies outside {inside[:-1]} reads no "
                f"tokens, so that samples cannot be told apart there; leave it out with a pattern"
            )
        if parameter in shared:
            raise ConfigError(f"probe.targets: {target!r} holds {parameter}, which several layers share")


def _fault(owner: nn.Module, local: str) -> str | None:
    """Why the gradient of a parameter cannot be read, or None if it can."""
    kind = type(owner).__name__
    if is_fused_experts(owner) and local in expert_parameters(owner):
        parallel = owner._is_expert_parallel
        return f"{kind} spreads its experts over ranks (expert parallelism)" if parallel else None
    if is_quantised(owner):
        return f"{kind} is quantised, so its weight has no gradient; use the adapters or lm_head as targets"
    if rule_for(owner, local) is None:
        return f"{kind} has no rule for per-sample gradients; leave it out with a pattern"
    return None


def _adapter_fault(model: nn.Module, parameter: str) -> str | None:
    """LoRA layers whose matrices are not modules that are called, but parts of a formula."""
    owner, lora, rest = parameter.partition(".lora_")
    if not lora:
        return None
    layer: Any = model.get_submodule(owner)
    if not hasattr(layer, "active_adapters"):
        return None
    if type(layer).__name__ == "ParamWrapper":
        return f"LoRA on a bare parameter ({owner}) has no rule; leave it out with a pattern"
    if any(getattr(layer, "use_dora", {}).values()):
        return "DoRA has no rule; leave it out with a pattern"
    adapter = rest.split(".")[1]
    if adapter not in layer.active_adapters or layer.disable_adapters or layer.merged:
        return f"adapter {adapter!r} has no part in the forward pass (inactive, merged or disabled)"
    return None


def _shared_parameters(anatomy: Anatomy) -> set[str]:
    """Names of parameters that have several, the embedding tied to the head left out."""
    names: dict[int, list[str]] = {}
    for name, parameter in anatomy.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [f"{anatomy.embedding_name}.weight", f"{anatomy.head_name}.weight"]
    return {n for group in names.values() if len(group) > 1 and sorted(group) != sorted(tied) for n in group}
