"""Whether bfloat16 and the attention implementation change which rows are picked, not only the numbers.

    python benchmarks/bf16_honesty.py                the demo's model and 2,000 rows of its corpus; minutes
    python benchmarks/bf16_honesty.py --model DIR --data x.jsonl      your own
    python benchmarks/bf16_honesty.py --smoke        seconds, to see that it works

The model is the demo's, which is pretrained: a random model's softmax is nearly uniform, and what rounding
does to it says nothing. Every line of the results compares two frozen probes of the same rows at the same
weights: Spearman's rank correlation over the rows, and the share that the best k % by one and by the other
have in common. `selection` is what the default criterion makes of the tables: its signal, and the rows that
it picks when it may keep k %.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from report import format_table, provenance, write_csv
from scipy.stats import spearmanr

from grads_dist.config import Config
from grads_dist.data.config import DataConfig
from grads_dist.demo.assets import Stopwatch, build_assets
from grads_dist.demo.size import TINY, DemoSize
from grads_dist.model.config import ModelConfig
from grads_dist.pipeline import run
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.run import select_from

TARGETS = ("embedding", "lm_head")
STATISTICS = ("max", "min", "mean", "std", "norm")
SHARES = (0.05, 0.1, 0.2, 0.5)
OVERLAPS = tuple(f"top_{round(100 * share)}" for share in SHARES)
COLUMNS = (
    *("compared", "with", "target", "statistic", "spearman", *OVERLAPS, "note", "num_rows", "model"),
    *("model_params", "corpus", "pretrain_loss"),
    *("device", "threads", "cpu_model", "torch", "deepspeed", "transformers", "commit", "date"),
)
TABLE = ("compared", "with", "target", "statistic", "spearman", *OVERLAPS, "note")


@dataclass(frozen=True)
class Precision:
    """How the weights are held and attention is computed."""

    dtype: str
    attention: str

    @property
    def name(self) -> str:
        """As in the results."""
        return f"{self.dtype} {self.attention}"


FLOAT, HALF = Precision("float32", "sdpa"), Precision("bfloat16", "sdpa")
PAIRS = (
    (HALF, FLOAT),
    (Precision("float32", "eager"), FLOAT),
    (Precision("bfloat16", "eager"), HALF),
    (Precision("bfloat16", "flash_attention_2"), HALF),
)
"""What is compared with what."""


@dataclass(frozen=True)
class Subject:
    """What is probed."""

    model: str
    data: DataConfig
    facts: Mapping[str, object]
    """What the results say of it."""


@dataclass(frozen=True)
class Found:
    """What one run found of every candidate row."""

    values: Mapping[tuple[str, str], np.ndarray]
    """Of (target, statistic), one number a row of the score table."""
    picked: Mapping[float, np.ndarray]
    """Rows of the corpus that are picked, by the share that may be kept."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the subject, probe it in every precision, write the CSV and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model folder; default: the demo's, pretrained on the spot")
    parser.add_argument("--data", help="corpus; needs --model")
    parser.add_argument("--rows", type=int, default=2000, help="rows that are probed")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    parser.add_argument("--out", help="folder of the CSV; default: benchmarks/results, temporary in smoke")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("grads_dist.demo").setLevel(logging.INFO)
    ranks = Ranks.start(detect())
    name = "bf16_smoke" if args.smoke else f"bf16_{ranks.device.type}"
    with tempfile.TemporaryDirectory() as temporary:
        lines = measure(subject_of(args, Path(temporary, "assets")), Path(temporary), ranks.device)
    out = Path(args.out or (tempfile.mkdtemp() if args.smoke else Path(__file__).parent / "results"))
    write_csv(out / f"{name}.csv", COLUMNS, lines)
    print(format_table(TABLE, lines))
    print(out / f"{name}.csv")
    ranks.close()


def subject_of(args: argparse.Namespace, folder: Path) -> Subject:
    """The model and corpus asked for, or those of the demo."""
    if args.model:
        facts = {"model": Path(args.model).name, "corpus": Path(args.data).name}
        facts |= {"model_params": None, "pretrain_loss": None}
        return Subject(args.model, DataConfig(path=args.data, limit=args.rows, max_length=512), facts)
    size = TINY if args.smoke else replace(DemoSize(), num_rows=args.rows)
    assets = build_assets(folder, size, Stopwatch())
    facts = {
        "model": "the demo's",
        "corpus": "the demo's",
        "model_params": assets.pretraining.num_parameters,
        "pretrain_loss": assets.pretraining.last_loss,
    }
    return Subject(str(assets.model), DataConfig(path=str(assets.corpus), max_length=size.max_length), facts)


def measure(subject: Subject, folder: Path, device: torch.device) -> list[dict[str, object]]:
    """Lines of all pairs; a precision that cannot be had here has one line with the reason."""
    constants = {**subject.facts, **provenance(device)}
    found: dict[Precision, Found] = {}
    lines: list[dict[str, object]] = []
    for one, other in PAIRS:
        labels = {"compared": one.name, "with": other.name}
        reason = why_not(one, device)
        if reason:
            blank = dict.fromkeys(COLUMNS) | labels | {"note": f"unrun: {reason}"}
            lines.append(blank | constants)
            continue
        for precision in (other, one):
            if precision not in found:
                found[precision] = probe(subject, precision, folder / precision.name.replace(" ", "_"))
        lines += [labels | line | constants for line in compare(found[one], found[other])]
    return lines


def why_not(precision: Precision, device: torch.device) -> str | None:
    """Why a precision cannot be had here, or None."""
    if precision.attention != "flash_attention_2":
        return None
    if device.type != "cuda":
        return "flash_attention_2 needs a GPU"
    return None if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"


def probe(subject: Subject, precision: Precision, folder: Path) -> Found:
    """Run the program in frozen mode, and read what it wrote."""
    config = Config(
        model=ModelConfig(
            name_or_path=subject.model,
            dtype=precision.dtype,  # type: ignore[arg-type]
            attn_implementation=precision.attention,
        ),
        data=subject.data,
        probe=ProbeConfig(mode="frozen", targets=list(TARGETS)),
        selection=SelectionConfig(fraction=SHARES[0]),
        output_dir=str(folder),
    )
    run(config)
    table = pq.read_table(folder / "scores.parquet").sort_by("index")
    values = {(t, s): table[f"{t}.{s}"].to_numpy().astype(np.float64) for t in TARGETS for s in STATISTICS}
    values["all", "loss"] = table["loss"].to_numpy()
    picked = {}
    for share in SHARES:
        wanted = replace(config, selection=replace(config.selection, fraction=share))
        selection = select_from(wanted, RunDir(folder))
        picked[share] = selection.selected_index
        values["selection", "signal"] = selection.signal
    return Found(values, picked)


def compare(one: Found, other: Found) -> list[dict[str, object]]:
    """A line for every number of a row, and one for the rows that are picked."""
    lines: list[dict[str, object]] = []
    for (target, statistic), values in one.values.items():
        truth = other.values[target, statistic]
        # The smallest element of a gradient is the more telling the further below 0 it lies.
        sign = -1 if statistic == "min" else 1
        shared = [overlap(best(sign * values, share), best(sign * truth, share)) for share in SHARES]
        correlation = float(spearmanr(values, truth).statistic)
        lines.append(_line(target, statistic, correlation, shared, len(values)))
    picked = [overlap(one.picked[share], other.picked[share]) for share in SHARES]
    return [*lines, _line("selection", "picked rows", None, picked, lines[0]["num_rows"])]


def _line(
    target: str, statistic: str, correlation: float | None, shared: list[float], num_rows: object
) -> dict[str, object]:
    labels = {"target": target, "statistic": statistic, "spearman": correlation, "note": None}
    return labels | dict(zip(OVERLAPS, shared, strict=True)) | {"num_rows": num_rows}


def best(values: np.ndarray, share: float) -> np.ndarray:
    """Rows with the largest values, ties by row; at least one."""
    return np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the larger set's rows that are in both."""
    return len(np.intersect1d(one, other)) / max(len(one), len(other))


if __name__ == "__main__":
    main()
