"""The steps of a selection against what one would write or install instead: the same work, in turns.

    python benchmarks/bench_select_rivals.py           a few minutes on 2 cores
    python benchmarks/bench_select_rivals.py --smoke   a few seconds, to see that it works

    step                ours                             rival
    neighbours          similarity.knn, exact            sklearn's NearestNeighbors, brute force by cosine
    density             FFT on a grid                    scipy's gaussian_kde; KDEpy's FFTKDE
    reduction           similarity reduction R, arrays   a numpy loop over rows
    mmr                 rounds on the graph              a greedy numpy loop, each pick over all rows
    facility location   rounds on the graph              apricot's lazy greedy on the same sparse graph

Results are compared before anything is timed, and `agreement` says how well they agree: the share of equal
neighbours, picks or values, the largest relative difference of densities, the ratio of the objective values.
Ratios are the rival's seconds over ours in the same repetition. The rivals are in the extra `benchmarks`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from report import format_table, provenance, write_csv
from scipy.sparse import csr_array, csr_matrix
from select_data import make_features
from timing import Spread, time_in_turns

from grads_dist.selection.config import Weights
from grads_dist.selection.density import gaussian_kde, silverman
from grads_dist.selection.facility import facility_values
from grads_dist.selection.mmr import mmr_values
from grads_dist.selection.ranks import positions, r, ranking
from grads_dist.selection.redundancy import redundancy
from grads_dist.selection.score import Terms
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import Neighbours, knn
from grads_dist.similarity.points import unit_rows

COLUMNS = (
    "step rival num_rows seconds_ours seconds_rival ratio_median ratio_min ratio_max agreement repeats "
    "device threads cpu_model torch deepspeed transformers commit date"
).split()
TABLE = "step rival num_rows seconds_ours seconds_rival ratio_median ratio_min ratio_max agreement".split()
DIM, K, SHARE = 128, 10, 0.1
WEIGHTS = Weights()
MASS_ONLY = Weights(g=0.0, d=1.0)


@dataclass(frozen=True)
class Contest:
    """One step done in two ways."""

    step: str
    rival: str
    num_rows: int
    ours: Callable[[], object]
    theirs: Callable[[], object]
    agreement: Callable[[object, object], float]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, time, write the CSV and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rows, args.repeats = 1000, 1
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        features = make_features(Path(temporary, "features.npy"), args.rows, DIM, 0)
        lines = [_line(contest, args.repeats) for contest in _contests(features)]
        out = args.out or (temporary if args.smoke else Path(__file__).parent / "results")
        write_csv(Path(out, "select_rivals_cpu.csv"), COLUMNS, lines)
    print(format_table(TABLE, lines))


def _line(contest: Contest, repeats: int) -> dict[str, object]:
    agreement = contest.agreement(contest.ours(), contest.theirs())
    ways = {"ours": lambda _: contest.ours(), "theirs": lambda _: contest.theirs()}
    device = torch.device("cpu")
    seconds = time_in_turns(ways, [None] * repeats, 0, device)
    spread = Spread.of(seconds["theirs"], seconds["ours"])
    return {
        "step": contest.step,
        "rival": contest.rival,
        "num_rows": contest.num_rows,
        "seconds_ours": float(np.median(seconds["ours"])),
        "seconds_rival": float(np.median(seconds["theirs"])),
        "ratio_median": spread.median,
        "ratio_min": spread.min,
        "ratio_max": spread.max,
        "agreement": agreement,
        "repeats": repeats,
        **provenance(device),
    }


def _contests(features: np.ndarray) -> list[Contest]:
    num_rows = len(features)
    graph = knn(unit_rows(features), SimilarityConfig(k=K, index="exact", device="cpu"))
    gradient = r(np.random.default_rng(1).random(num_rows))
    return [
        _neighbours(features),
        *_densities(num_rows),
        _reduction(graph, gradient),
        _mmr(graph, gradient),
        _facility(graph),
    ]


def _neighbours(features: np.ndarray) -> Contest:
    from sklearn.neighbors import NearestNeighbors

    def ours() -> np.ndarray:
        return knn(unit_rows(features), SimilarityConfig(k=K, index="exact", device="cpu")).ids

    def theirs() -> np.ndarray:
        centred = features - features.mean(0, dtype=np.float64)
        search = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine", n_jobs=-1)
        return search.fit(centred.astype(np.float32)).kneighbors(return_distance=False)

    def agreement(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(one, other, strict=True)]))

    return Contest("neighbours", "sklearn brute", len(features), ours, theirs, agreement)


def _densities(num_rows: int) -> list[Contest]:
    from KDEpy import FFTKDE
    from scipy.stats import gaussian_kde as scipy_kde

    def difference(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.max(np.abs(one / other - 1)))

    draw = np.random.default_rng(0)
    small, large = draw.normal(size=num_rows), draw.normal(size=50 * num_rows)

    def by_scipy() -> np.ndarray:
        return scipy_kde(small, silverman(small) / small.std(ddof=1))(small)

    def by_kdepy() -> np.ndarray:
        grid, values = FFTKDE(bw=silverman(large)).fit(large).evaluate(2**14)
        return np.interp(large, grid, values)

    return [
        Contest("density", "scipy gaussian_kde", len(small), _density_of(small), by_scipy, difference),
        Contest("density", "KDEpy FFTKDE", len(large), _density_of(large), by_kdepy, difference),
    ]


def _density_of(signal: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: gaussian_kde(signal, silverman(signal))


def _reduction(graph: Neighbours, gradient: np.ndarray) -> Contest:
    def ours() -> np.ndarray:
        return redundancy(graph, gradient).values

    def theirs() -> np.ndarray:
        place, tau = positions(gradient), redundancy_tau(graph)
        members: dict[int, list[int]] = {}
        for row, group in enumerate(graph.group):
            members.setdefault(int(group), []).append(row)
        values = np.zeros(len(gradient))
        for row in range(len(gradient)):
            closest = -np.inf
            near = [(other, 1.0) for other in members[int(graph.group[row])] if other != row]
            for listed, cosine in zip(graph.ids[row], graph.cosine[row], strict=True):
                near += [(other, float(cosine)) for other in members[int(graph.group[listed])]]
            for other, cosine in near:
                if place[other] < place[row]:
                    closest = max(closest, cosine)
            values[row] = max(0.0, (closest - tau) / (1 - tau))
        return values

    def agreement(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean(np.abs(one - other) < 1e-6))

    return Contest("reduction", "numpy loop", len(gradient), ours, theirs, agreement)


def redundancy_tau(graph: Neighbours) -> float:
    """The median cosine of the last neighbour."""
    return float(np.median(graph.cosine[:, -1].astype(np.float64)))


def _mmr(graph: Neighbours, gradient: np.ndarray) -> Contest:
    num_rows = len(gradient)
    budget, tau = round(SHARE * num_rows), redundancy_tau(graph)
    everyone = np.ones(num_rows, bool)
    nothing = np.zeros(num_rows)
    terms = Terms(gradient, nothing, nothing, nothing.astype(np.int64), tau, gradient)
    links = _symmetric(graph)

    def ours() -> np.ndarray:
        values = mmr_values(terms, WEIGHTS, graph, everyone, np.zeros(num_rows, np.int64))
        return np.sort(ranking(values)[:budget])

    def theirs() -> np.ndarray:
        closest, value = np.full(num_rows, -np.inf), gradient.copy()
        picked = []
        for _ in range(budget):
            best = int(np.argmax(value))
            picked.append(best)
            span = slice(links.indptr[best], links.indptr[best + 1])
            near = links.indices[span]
            closest[near] = np.maximum(closest[near], links.data[span])
            value[near] = gradient[near] - np.maximum(0, (closest[near] - tau) / (1 - tau))
            value[picked] = -np.inf
        return np.sort(picked)

    return Contest("mmr", "numpy loop", num_rows, ours, theirs, _same_picks)


def _facility(graph: Neighbours) -> Contest:
    from apricot import FacilityLocationSelection

    num_rows = len(graph.ids)
    budget = round(SHARE * num_rows)
    everyone, one_part = np.ones(num_rows, bool), np.zeros(num_rows, np.int64)
    similarity = _symmetric(graph, selves=True)
    given = csr_matrix(similarity)
    # apricot is compiled for these.
    given.indices, given.indptr = given.indices.astype(np.int32), given.indptr.astype(np.int32)

    def ours() -> np.ndarray:
        values = facility_values(np.zeros(num_rows), MASS_ONLY, graph, everyone, one_part)
        return np.sort(ranking(values)[:budget])

    def theirs() -> np.ndarray:
        search = FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy")
        return np.sort(search.fit(given).ranking)

    def covered(rows: np.ndarray) -> float:
        return float(similarity[rows].max(axis=0).toarray().sum())

    return Contest(
        "facility location",
        "apricot",
        num_rows,
        ours,
        theirs,
        lambda one, other: covered(one) / covered(other),
    )


def _same_picks(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.isin(one, other).mean())


def _symmetric(graph: Neighbours, selves: bool = False) -> csr_array:
    """Cosines of rows of which either lists the other or a copy of it, and 1 between copies."""
    num_rows, width = graph.ids.shape
    group = graph.group.astype(np.int64)
    ends = np.stack([np.repeat(group, width), group[graph.ids.ravel()]])
    key, place = np.unique(ends.min(0) * num_rows + ends.max(0), return_inverse=True)
    cosine = np.zeros(len(key))
    np.maximum.at(cosine, place, graph.cosine.ravel())
    one, other = key // num_rows, key % num_rows
    apart = one != other
    one, other, cosine = one[apart], other[apart], cosine[apart]
    groups = csr_array((cosine, (one, other)), shape=(num_rows, num_rows))
    member = csr_array((np.ones(num_rows), (np.arange(num_rows), group)), shape=(num_rows, num_rows))
    links = member @ (groups + groups.T) @ member.T + member @ member.T
    if not selves:
        links = links - csr_array((np.ones(num_rows), (np.arange(num_rows), np.arange(num_rows))))
        links.eliminate_zeros()
    return links.tocsr()


if __name__ == "__main__":
    main()
