"""Collects the statistics of all targets over one micro-batch, from the layers and from the head's pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from grads_dist.model.anatomy import Anatomy
from grads_dist.stats import ops
from grads_dist.stats.gradients import SampleGradient, TouchedRows, Zero
from grads_dist.stats.head_request import HeadProjections, HeadResult
from grads_dist.stats.layers import LayerReader
from grads_dist.stats.segments import BatchLayout
from grads_dist.stats.sketch import Sketcher, sketch
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import TIED, Targets
from grads_dist.stats.tensors import to_device


class Recorder:
    """Per-sample gradient statistics of a model's targets, one micro-batch at a time.

    Attach it before DeepSpeed wraps the model. `with recorder.batch(layout):` goes around the forward and
    backward pass of a micro-batch; `finish(head)` then gives the numbers, freed of whatever factor the batch
    put on each sample's loss.

    Args:
        anatomy: the model and its parts.
        targets: what statistics are read of.
        sketcher: what else is sketched, in the batches that ask for it.
        extremes: whether minimum and maximum are wanted; without, they are NaN.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        targets: Targets,
        sketcher: Sketcher | None = None,
        extremes: bool = True,
    ) -> None:
        self.targets, self._sketcher, self.extremes = targets, sketcher, extremes
        self._sketching = False
        self._sketch: Tensor | None = None
        self._anatomy = anatomy
        self._found: dict[str, Statistics] = {}
        self._tied_rows: ops.EmbeddingRows | None = None
        self._embedding = f"{anatomy.embedding_name}.weight"
        self._reader = LayerReader(anatomy.model, self._layer_parameters(), self._consume, share=True)

    @property
    def needs_backward(self) -> bool:
        """False when the LM head's own pass yields all that is asked for."""
        return bool(self._reader.modules)

    @property
    def needs_head(self) -> bool:
        """Whether the LM head's gradient is part of a target."""
        return bool({TIED, *self._head_parameters} & self.targets.parameters)

    @property
    def needs_tied(self) -> bool:
        """Whether the sum of embedding and LM head gradient is asked for."""
        return TIED in self.targets.parameters

    @contextmanager
    def batch(self, layout: BatchLayout, sketching: bool = False) -> Iterator[None]:
        """Record the passes inside the block as those of one micro-batch, with sketches if asked for."""
        self._found, self._tied_rows, self._sketch = {}, None, None
        self._sketching = sketching and self._sketcher is not None
        with self._reader.batch(layout):
            yield

    def finish(self, head: HeadResult) -> dict[str, Statistics]:
        """Statistics of every target for the S samples of the last batch.

        Raises ConfigError naming a layer that the backward pass did not reach.
        """
        self._reader.complete(Zero(len(head.losses), head.losses.device))
        per_parameter = self._found
        if head.factors is not None:
            inverse = 1 / head.factors
            per_parameter = {name: stats.scaled(inverse) for name, stats in per_parameter.items()}
        per_parameter.update(self._head_statistics(head))
        found = {target: _merged(names, per_parameter) for target, names in self.targets.members.items()}
        return found if self.extremes else {name: stats.without_extremes() for name, stats in found.items()}

    def detach(self) -> None:
        """Leave the model as it was."""
        self._reader.detach()

    @property
    def head_projections(self) -> HeadProjections | None:
        """What the head's gradient is to be sketched by in the present batch."""
        if not self._sketching or self._sketcher is None:
            return None
        weight, bias = self._head_parameters
        # The tied weight's one gradient is the embedding's and the head's, and has one projection.
        weights = (*self._sketcher.of(weight), *self._sketcher.of(TIED))
        biases = self._sketcher.of(bias)
        return HeadProjections(weights, biases) if weights or biases else None

    def sketch(self, head: HeadResult) -> Tensor | None:
        """Sketches of the last batch's gradients [S, k * k], after `finish`; None if none were asked for."""
        if not self._sketching:
            return None
        total = self._sketch
        if total is not None:
            assert head.factors is not None
            total = total / head.factors[:, None, None]
        if head.sketch is not None:
            total = head.sketch if total is None else total + head.sketch
        assert total is not None
        return total.flatten(1)

    @property
    def _head_parameters(self) -> tuple[str, str]:
        head = self._anatomy.head_name
        return f"{head}.weight", f"{head}.bias"

    def _layer_parameters(self) -> set[str]:
        """What the layers are read for: all but the head, and the embedding for the tied weight."""
        wanted = set(self.targets.parameters)
        if self._sketcher is not None:
            wanted |= self._sketcher.parameters
        if TIED in wanted:
            wanted.add(self._embedding)
        return wanted - {TIED, *self._head_parameters}

    def _consume(self, parameter: str, gradient: SampleGradient) -> None:
        if parameter == self._embedding and self.needs_tied:
            assert isinstance(gradient, TouchedRows)
            self._tied_rows = gradient.touched
        if parameter in self.targets.parameters:
            self._found[parameter] = gradient.statistics(self.extremes)
        if self._sketching:
            self._add_sketches(parameter, gradient)

    def _add_sketches(self, parameter: str, gradient: SampleGradient) -> None:
        assert self._sketcher is not None
        projections = self._sketcher.of(parameter)
        if parameter == self._embedding:
            projections += self._sketcher.of(TIED)
        for projection in projections:
            found = sketch(gradient, projection)
            self._sketch = found if self._sketch is None else self._sketch + found

    def _head_statistics(self, head: HeadResult) -> dict[str, Statistics]:
        weight, bias = self._head_parameters
        found: dict[str, Statistics] = {}
        if head.weight_stats is not None:
            found[weight] = head.weight_stats
        if head.bias_stats is not None:
            found[bias] = head.bias_stats
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


def _merged(names: tuple[str, ...], per_parameter: dict[str, Statistics]) -> Statistics:
    merged = per_parameter[names[0]]
    for name in names[1:]:
        merged = merged.merge(per_parameter[name])
    return merged


def distinct_ids(
    tokens: Sequence[np.ndarray], padding_idx: int | None, device: torch.device
) -> tuple[Tensor, ...]:
    """Each sample's sorted distinct token ids but `padding_idx`: the rows its embedding gradient touches."""
    kept = [np.unique(ids) for ids in tokens]
    if padding_idx is not None:
        kept = [ids[ids != padding_idx] for ids in kept]
    return to_device(np.concatenate(kept), torch.int64, device).split([len(ids) for ids in kept])
