"""The k nearest neighbours of every row by cosine, on one rank or on several."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from grads_dist.errors import DataError
from grads_dist.similarity import store
from grads_dist.similarity.backend import Backend, choose_backend
from grads_dist.similarity.build import agreed, build, on_main
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.graph import Neighbours, Search
from grads_dist.similarity.points import UnitRows

if TYPE_CHECKING:
    from grads_dist.runtime.ranks import Ranks

__all__ = ["Backend", "Neighbours", "Search", "choose_backend", "knn"]

logger = logging.getLogger(__name__)

_MAX_ROWS = 1 << 31


def knn(
    points: UnitRows, config: SimilarityConfig, folder: Path | None = None, ranks: Ranks | None = None
) -> Neighbours:
    """k nearest neighbours by cosine of centred features (docs/selection.md, "Neighbours").

    A row is never its own neighbour. Rows without a direction (a value that is not finite, or features
    equal to the mean) have no neighbours and are nobody's. With fewer than k other rows all of them are
    neighbours.

    Args:
        points: the rows.
        config: number of neighbours, index, library and device.
        folder: where the graph is kept, and found again when features, rows and options are the same; needed
            under several ranks, who all see it.
        ranks: the ranks that share the work; then all of them call this, with the same rows.

    Raises:
        ConfigError: library, device or index cannot be used here. Raised on all ranks.
        DataError: there are too many rows, or a rank does not see the folder. Raised on all ranks.
    """
    if points.num_rows >= _MAX_ROWS:
        raise DataError(f"{points.num_rows} rows cannot be compared; allowed: fewer than {_MAX_ROWS}")
    backend = agreed(ranks, lambda: choose_backend(config))
    if folder is None:
        assert ranks is None or ranks.world_size == 1, "several ranks meet in a folder"
        with tempfile.TemporaryDirectory() as scratch:
            return build(points, config, backend, Path(scratch), ranks).graph()
    folder = Path(folder)
    options = {"k": config.k, "index": config.index, "recall": config.recall}
    options |= {"library": backend.library, "device": backend.device}
    key = on_main(ranks, lambda: store.fingerprint(points, options))
    with contextlib.ExitStack() as held:
        on_main(ranks, lambda: held.enter_context(store.locked(folder)))
        if on_main(ranks, lambda: store.load(folder, key) is not None):
            logger.info("similarity: the neighbours of %d rows are those in %s", points.num_rows, folder)
        else:
            on_main(ranks, lambda: store.forget(folder))
            built = build(points, config, backend, folder, ranks)
            on_main(ranks, lambda: built.write(folder, key))
        return agreed(ranks, lambda: _kept(folder, key))


def _kept(folder: Path, key: str) -> Neighbours:
    """The graph that the main rank sees in the folder."""
    graph = store.load(folder, key)
    if graph is None:
        raise DataError(
            f"similarity: {folder} does not show this rank the graph that the main rank keeps there"
        )
    return graph
