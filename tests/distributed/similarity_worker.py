"""What the ranks of test_similarity_ranks.py do: find the neighbours once for each entry of a JSON list.

    torchrun --nproc-per-node 2 tests/distributed/similarity_worker.py jobs.json

An entry holds the features' file, the folder of the graph, the options, the memory that an index may take in
bytes (null: as it comes), and a folder for what each rank gets: its arrays, or its error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np

from grads_dist.errors import GradsDistError
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks
from grads_dist.similarity import build, shares
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import knn
from grads_dist.similarity.points import unit_rows


def main() -> None:
    ranks = Ranks.start(detect())
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        points = unit_rows(np.load(job["features"], mmap_mode="r", allow_pickle=False))
        out = Path(job["out"])
        # Ranks have different memory, and the least of it counts.
        limit = (job["limit"] or 1 << 30) + ranks.rank * (1 << 20)
        with (
            mock.patch.object(shares, "_BLOCK_ROWS", 64),
            mock.patch.object(shares, "_MIN_SHARD", 1),
            mock.patch.object(build, "index_limit", mock.Mock(return_value=limit)),
        ):
            try:
                graph = knn(points, SimilarityConfig(**job["options"]), Path(job["graph"]), ranks)
            except GradsDistError as error:
                (out / f"{ranks.rank}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                continue
        np.savez(out / f"{ranks.rank}.npz", ids=graph.ids, cosine=graph.cosine, group=graph.group)
    ranks.close()


if __name__ == "__main__":
    main()
