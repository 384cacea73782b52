"""Collects the statistics of all targets over one micro-batch, from hooks and from the head's pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import Anatomy
from grads_dist.stats import ops
from grads_dist.stats.capture import capture
from grads_dist.stats.head_request import HeadResult
from grads_dist.stats.rules import check_rms_norm, embedding_rows_of, is_rms_norm, rule_for
from grads_dist.stats.segments import BatchLayout
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import TIED, Targets


class Recorder:
    """Per-sample gradient statistics of a model's targets, one micro-batch at a time.

    Attach it before DeepSpeed wraps the model. `with recorder.batch(layout):` goes around the forward and
    backward pass of a micro-batch; `finish(head)` then gives the numbers, freed of whatever factor the batch
    put on each sample's loss.
    """

    def __init__(self, anatomy: Anatomy, targets: Targets) -> None:
        self.targets = targets
        self._anatomy = anatomy
        self._layout: BatchLayout | None = None
        self._found: dict[str, Statistics] = {}
        self._tied_rows: ops.EmbeddingRows | None = None
        self._seen: set[str] = set()
        self._checked: set[type[nn.Module]] = set()
        self._modules = self._needed_modules()
        self._wanted = {name: self._wanted_of(name) for name in self._modules}
        for name in self._modules:
            self._attach(name)

    @property
    def needs_backward(self) -> bool:
        """False when the LM head's own pass yields all that is asked for."""
        return bool(self._modules)

    @property
    def needs_head(self) -> bool:
        """Whether the LM head's gradient is part of a target."""
        head = self._anatomy.head_name
        return bool({TIED, f"{head}.weight", f"{head}.bias"} & self.targets.parameters)

    @property
    def needs_tied(self) -> bool:
        """Whether the sum of embedding and LM head gradient is asked for."""
        return TIED in self.targets.parameters

    @contextmanager
    def batch(self, layout: BatchLayout) -> Iterator[None]:
        """Record the passes inside the block as those of one micro-batch."""
        self._layout, self._found, self._tied_rows, self._seen = layout, {}, None, set()
        try:
            yield
        finally:
            self._layout = None

    def finish(self, head: HeadResult) -> dict[str, Statistics]:
        """Statistics of every target for the S samples of the last batch.

        Raises ConfigError naming a layer that the backward pass did not reach.
        """
        missing = set(self._modules) - self._seen
        if missing:
            raise ConfigError(f"probe.targets: no gradient reached {sorted(missing)[0]} in the backward pass")
        per_parameter = self._found
        if head.factors is not None:
            inverse = 1 / head.factors
            per_parameter = {name: stats.scaled(inverse) for name, stats in per_parameter.items()}
        per_parameter.update(self._head_statistics(head))
        return {target: self._merged(names, per_parameter) for target, names in self.targets.members.items()}

    def _merged(self, names: tuple[str, ...], per_parameter: dict[str, Statistics]) -> Statistics:
        merged = per_parameter[names[0]]
        for name in names[1:]:
            merged = merged.merge(per_parameter[name])
        return merged

    def _needed_modules(self) -> list[str]:
        """Modules to hook: the owners of all wanted parameters, the head left out, the embedding for tied."""
        head = self._anatomy.head_name
        names = {p.rpartition(".")[0] for p in self.targets.parameters if p != TIED}
        if self.needs_tied:
            names.add(self._anatomy.embedding_name)
        return sorted(names - {head})

    def _wanted_of(self, module: str) -> frozenset[str]:
        """Local names of the module's parameters that some target needs."""
        split = (p.rpartition(".") for p in self.targets.parameters)
        return frozenset(local for owner, _, local in split if owner == module)

    def _attach(self, name: str) -> None:
        module = self._anatomy.model.get_submodule(name)
        check = partial(self._check_norm, name, module) if is_rms_norm(module) else None
        capture(module, partial(self._sink, name, module), lambda: self._layout is not None, check)

    def _check_norm(self, name: str, module: nn.Module, layer_input: Tensor, output: Tensor) -> None:
        if type(module) in self._checked:
            return
        if not check_rms_norm(module, layer_input, output):
            raise ConfigError(
                f"probe.targets: {name} ({type(module).__name__}) is no RMS norm of a known form"
            )
        self._checked.add(type(module))

    def _sink(self, name: str, module: nn.Module, layer_input: Tensor, grad: Tensor) -> None:
        if self._layout is None:
            return
        if name in self._seen:
            raise ConfigError(f"probe.targets: {name} is used more than once in a pass, which has no rule")
        self._seen.add(name)
        if name == self._anatomy.embedding_name:
            self._sink_embedding(name, module, layer_input, grad)
            return
        rule = rule_for(module, "weight")
        assert rule is not None
        try:
            found = rule(module, layer_input, grad, self._layout)
        except ValueError as error:
            raise ConfigError(f"probe.targets: {name}: {error}") from None
        self._found.update(
            {f"{name}.{local}": stats for local, stats in found.items() if local in self._wanted[name]}
        )

    def _sink_embedding(self, name: str, module: nn.Module, ids: Tensor, grad: Tensor) -> None:
        assert self._layout is not None
        rows = embedding_rows_of(module, ids, grad, self._layout)
        if self.needs_tied:
            self._tied_rows = rows
        self._found[f"{name}.weight"] = ops.embedding_stats(rows, module.num_embeddings)  # type: ignore[arg-type]

    def _head_statistics(self, head: HeadResult) -> dict[str, Statistics]:
        name = self._anatomy.head_name
        found: dict[str, Statistics] = {}
        if head.weight_stats is not None:
            found[f"{name}.weight"] = head.weight_stats
        if head.bias_stats is not None:
            found[f"{name}.bias"] = head.bias_stats
        if self._tied_rows is not None:
            found[TIED] = self._tied_statistics(self._tied_rows, head)
        return found

    def _tied_statistics(self, embedding: ops.EmbeddingRows, head: HeadResult) -> Statistics:
        """Statistics of E + D: the head's other rows, and its kept rows with the embedding's added."""
        assert head.rest_stats is not None and head.factors is not None
        inverse = (1 / head.factors).to(embedding.rows.dtype)
        sample_U = embedding.segments.sample_of_row(embedding.rows.device)
        sums = torch.cat(head.kept_rows) + embedding.rows * inverse[sample_U][:, None]
        return head.rest_stats.merge(ops.ragged_row_stats(sums, embedding.segments))


def distinct_ids(ids_ST: Tensor, layout: BatchLayout, padding_idx: int | None) -> tuple[Tensor, ...]:
    """Each sample's sorted distinct token ids but `padding_idx`: the rows its embedding gradient touches."""
    kept = []
    for row, length in zip(ids_ST, layout.segments.lengths, strict=True):
        ids = torch.unique(row[:length])
        kept.append(ids if padding_idx is None else ids[ids != padding_idx])
    return tuple(kept)
