"""How well the criterion `less` on gradient features agrees from seed to seed, and with whole gradients.

    python benchmarks/sketch_seeds.py --model runs/demo_assets/model --data runs/demo_assets/corpus.jsonl

Prints Spearman's rank correlation of the criterion between seeds, and with the one from gradients that
autograd forms for one row at a time, and the share of the best tenth that both have; writes
results/sketch_seeds.csv.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from report import provenance, write_csv
from scipy.stats import spearmanr
from torch import Tensor, nn

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.store import TokenStore
from grads_dist.data.tokenize import tokenize
from grads_dist.data.tokenizer import TokenizerSource
from grads_dist.model.anatomy import dissect
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import load_model
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.batches import collate
from grads_dist.similarity.relevance import relevance
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.sketch import Sketcher, unit_length
from grads_dist.stats.targets import resolve_targets

CPU = torch.device("cpu")
KINDS = {"embedding + lm_head": ["embedding", "lm_head"], "linear": ["linear"]}
BATCH_ROWS = 8
RESULT = Path(__file__).with_name("results") / "sketch_seeds.csv"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--targets", type=int, default=60)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        store = load_tokens(args, cache)
        rows = np.random.default_rng(0).permutation(store.num_rows)
        lines = [line for kind in KINDS for line in measure(args, store, rows, kind)]
    write_csv(args.output, list(lines[0]), lines)


def load_tokens(args: argparse.Namespace, cache: str) -> TokenStore:
    """As many rows as are asked for, from the head of the corpus."""
    data = DataConfig(path=args.data, max_length=128, limit=args.rows + args.targets, cache_dir=cache)
    return tokenize(data, Corpus.open(data), TokenizerSource(args.model))


def measure(args: argparse.Namespace, store: TokenStore, rows: np.ndarray, kind: str) -> list[dict]:
    """One line for each number of dimensions."""
    truth = whole_gradients(args, store, rows, KINDS[kind])
    lines = []
    for dim in args.dims:
        scores = []
        for seed in range(args.seeds):
            vectors = sketches(args.model, store, rows, KINDS[kind], seed, dim)
            scores.append(relevance(vectors[: args.rows], vectors[args.rows :], "mean"))
        between = [spearmanr(one, other).statistic for one, other in itertools.combinations(scores, 2)]
        line = {
            "targets": kind,
            "dim": dim,
            "seed_to_seed": round(float(np.mean(between)), 3),
            "with_whole_gradients": round(float(np.mean([spearmanr(s, truth).statistic for s in scores])), 3),
            "best_tenth_shared": round(float(np.mean([shared(s, truth) for s in scores])), 3),
            "rows": args.rows,
            "target_rows": args.targets,
            "model": Path(args.model).parent.name,
            **provenance(CPU),
        }
        print({name: line[name] for name in list(line)[:5]}, flush=True)
        lines.append(line)
    return lines


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the best tenth by one that is in the best tenth by the other."""
    count = len(one) // 10
    return len(set(np.argsort(-one)[:count]) & set(np.argsort(-other)[:count])) / count


def sketches(
    folder: str, store: TokenStore, rows: np.ndarray, wanted: list[str], seed: int, dim: int
) -> np.ndarray:
    """Gradient features of the rows, as a frozen probe makes them."""
    model = load_model(ModelConfig(name_or_path=folder), torch.float32, CPU).requires_grad_(False)
    anatomy = dissect(model)
    targets = resolve_targets(wanted, anatomy)
    recorder = Recorder(anatomy, resolve_targets(["lm_head"], anatomy), Sketcher(targets, seed, dim))
    probed = ProbedModel(anatomy, recorder, 256 << 20)
    probed.fuse_head()
    found = []
    for start in range(0, len(rows), BATCH_ROWS):
        chosen = rows[start : start + BATCH_ROWS]
        batch = collate(store, chosen, np.ones(len(chosen)), CPU, anatomy.head_counts)
        with recorder.batch(batch.layout, sketching=True):
            probed(batch, record=True).backward()
        recorder.finish(probed.head_result)
        found.append(unit_length(recorder.sketch(probed.head_result)))
    return torch.cat(found).to(torch.float16).numpy()


def whole_gradients(
    args: argparse.Namespace, store: TokenStore, rows: np.ndarray, wanted: list[str]
) -> np.ndarray:
    """The criterion itself, from autograd, one row at a time."""
    model = load_model(ModelConfig(name_or_path=args.model), torch.float32, CPU)
    members = resolve_targets(wanted, dissect(model)).members.values()
    parameters = [model.get_parameter(name) for names in members for name in names]

    def unit(row: int) -> Tensor:
        ids = torch.from_numpy(store.tokens(row).astype(np.int64))[None]
        mask = torch.from_numpy(store.loss_mask(row).copy())[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        return gradient / gradient.norm()

    mean = sum(unit(int(row)) for row in rows[args.rows :]) / args.targets
    return np.array([float(unit(int(row)) @ mean) for row in rows[: args.rows]])


if __name__ == "__main__":
    main()
