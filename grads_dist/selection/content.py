"""What a selection holds of its corpus by the features of the rows; docs/selection.md, "Summary"."""

from __future__ import annotations

from typing import Any

import numpy as np

from grads_dist.selection.coverage import describe_coverage, describe_redundancy
from grads_dist.selection.sampling import random_subset
from grads_dist.selection.vendi import describe_vendi
from grads_dist.similarity.knn import Neighbours
from grads_dist.similarity.points import UnitRows, unit_rows


def describe_content(
    features: np.ndarray,
    places: np.ndarray,
    index: np.ndarray,
    selected: np.ndarray,
    name: str,
    seed: int,
    points: UnitRows | None = None,
    graph: Neighbours | None = None,
) -> dict[str, Any]:
    """Coverage, redundancy and Vendi score of the selected rows, and of as many random ones.

    Args:
        features: of the rows of the score table, [rows, dim], possibly a memory map.
        places: where the n candidates stand in it, int64 [n].
        index: their row numbers in the corpus, int64 [n].
        selected: bool [n].
        name: of the features.
        seed: of the random rows and the samples.
        points: the candidates' unit rows, where they are known already.
        graph: their neighbours, where they were searched.
    """
    points = points or unit_rows(features, places)
    subsets = {"selected": selected, "random": random_subset(index, int(selected.sum()), seed)}
    return {
        "coverage": describe_coverage(points, index, subsets, seed),
        "redundancy": describe_redundancy(points, index, subsets, graph, seed),
        "vendi": {name: describe_vendi(features, places, index, selected, seed)},
    }
