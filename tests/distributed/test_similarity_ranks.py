"""Several ranks find the graph that one rank finds, in shares of the queries or of what is searched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from similarity_data import clustered, neighbours
from workspace import launch

from grads_dist.similarity import build, faiss_index, shares
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import knn
from grads_dist.similarity.points import unit_rows

WORKER = Path(__file__).with_name("similarity_worker.py")
NUM_ROWS, DIM, K = 900, 8, 5
ONE_SHARD_IN_THREE = 300 * (2 * DIM + 8)

pytestmark = pytest.mark.skipif(not faiss_index.is_installed(), reason="faiss is not installed")


@dataclass(frozen=True)
class Case:
    """One way to find the neighbours."""

    name: str
    index: str
    library: str = "faiss"
    limit: int | None = None
    """Bytes an index may take; None for more than it needs."""

    @property
    def options(self) -> dict[str, object]:
        return {"k": K, "index": self.index, "library": self.library, "device": "cpu", "recall": 0.9}


CASES = [
    Case("exact", "exact"),
    Case("exact-torch", "exact", library="torch"),
    Case("exact-sharded", "exact", limit=4 * DIM * 200),
    Case("ivf", "IVF32,SQfp16"),
    Case("ivf-sharded", "IVF8,SQfp16", limit=ONE_SHARD_IN_THREE),
]
FAILURES = [Case("untrainable", "IVF5000,Flat"), Case("nonsense", "Nonsense")]


class Runs:
    """What two ranks got, in one launch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.features = clustered(NUM_ROWS, DIM)
        np.save(folder / "features.npy", self.features)
        jobs = [self._job(case) for case in [*CASES, *FAILURES, CASES[0]]]
        (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        launch(2, WORKER, str(folder / "jobs.json"))

    def _job(self, case: Case) -> dict:
        out = self.folder / "out" / case.name
        out.mkdir(parents=True, exist_ok=True)
        return {
            "features": str(self.folder / "features.npy"),
            "graph": str(self.folder / "graphs" / case.name),
            "options": case.options,
            "limit": case.limit,
            "out": str(out),
        }

    def of(self, case: Case) -> list[dict[str, np.ndarray]]:
        """The arrays that each rank got."""
        paths = [self.folder / "out" / case.name / f"{rank}.npz" for rank in range(2)]
        return [dict(np.load(path, allow_pickle=False)) for path in paths]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("similarity"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_find_what_one_finds(runs, case, monkeypatch):
    monkeypatch.setattr(shares, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(shares, "_MIN_SHARD", 1)
    monkeypatch.setattr(build, "index_limit", lambda device, ranks: case.limit or 1 << 30)
    alone = knn(unit_rows(runs.features), SimilarityConfig(**case.options))
    for found in runs.of(case):
        np.testing.assert_array_equal(found["ids"], alone.ids)
        np.testing.assert_array_equal(found["cosine"], alone.cosine)
        np.testing.assert_array_equal(found["group"], alone.group)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_two_ranks_find_the_true_neighbours(runs, case):
    ids, cosine = neighbours(runs.features, K)
    for found in runs.of(case):
        np.testing.assert_array_equal(found["ids"], ids)
        np.testing.assert_array_equal(found["cosine"], cosine)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_folder_holds_the_graph_and_nothing_else(runs, case):
    names = sorted(path.name for path in (runs.folder / "graphs" / case.name).iterdir())
    assert names == [".lock", "cosine.npy", "graph.json", "group.npy", "ids.npy"]
    about = json.loads((runs.folder / "graphs" / case.name / "graph.json").read_text(encoding="utf-8"))
    assert about["search"]["exact"] == (case.index == "exact")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_queries_are_shared_out_in_whole_blocks(monkeypatch, num_ranks):
    monkeypatch.setattr(shares, "_BLOCK_ROWS", 64)
    queries = np.random.default_rng(0).permutation(1000)
    mine = [shares.share_of(queries, shares.Place(rank, num_ranks)) for rank in range(num_ranks)]
    assert sorted(np.concatenate(mine)) == list(range(1000))
    assert all(len(part) >= 192 for part in mine)
    whole = [queries[start : start + 64].tolist() for start in range(0, 1000, 64)]
    blocks = [part[start : start + 64].tolist() for part in mine for start in range(0, len(part), 64)]
    assert sorted(whole) == sorted(blocks)


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.name)
def test_all_ranks_get_the_same_line(runs, case):
    lines = [(runs.folder / "out" / case.name / f"{rank}.error").read_text() for rank in range(2)]
    assert lines[0] == lines[1] and "\n" not in lines[0]
    assert lines[0].startswith(f"ConfigError: similarity.index: '{case.index}' cannot be used: ")
