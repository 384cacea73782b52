"""What a selection did, in numbers for summary.json; see docs/selection.md, "Summary"."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa

from grads_dist.selection.budget import Budget
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import CONTROLS, control_score
from grads_dist.selection.density import Density
from grads_dist.selection.duplicates import Candidates
from grads_dist.selection.pick import top_k
from grads_dist.selection.ranks import is_constant, r
from grads_dist.selection.signal import Signal

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# Rank correlations are found on about this many evenly spaced rows: more would change no digit that is read.
_CORRELATED_ROWS = 1_000_000


def describe_counts(
    num_scored: int, found: Candidates, num_allowed: int, selected: np.ndarray
) -> dict[str, Any]:
    """Rows from the score table down to the selection; `num_allowed` could be picked."""
    return {
        "scored": num_scored,
        "nonfinite": found.num_nonfinite,
        "copies": len(found.copies),
        "sets_of_copies": len(np.unique(found.originals)),
        "candidates": len(selected),
        "allowed": num_allowed,
        "selected": int(selected.sum()),
    }


def describe_budget(config: SelectionConfig, budget: Budget) -> dict[str, Any]:
    """What was asked for and what it came to."""
    asked = {"fraction": config.fraction, "rows": config.rows, "tokens": config.tokens}
    return {"asked": asked, "unit": budget.unit, "limit": None if budget.unit == "none" else budget.limit}


def describe_shares(table: pa.Table, selected: np.ndarray) -> dict[str, Any]:
    """Shares of the candidates' rows and tokens that are selected, and the mean lengths."""
    result: dict[str, Any] = {"rows": number(selected.mean())}
    for name in ("num_tokens", "num_label_tokens"):
        values = table.column(name).to_numpy().astype(np.float64)
        total = values.sum()
        result[name] = {
            "share": number(values[selected].sum() / total) if total > 0 else None,
            "sum_selected": int(values[selected].sum()),
            "mean_all": number(values.mean()),
            "mean_selected": number(values[selected].mean()),
        }
    return result


def describe_terms(terms: dict[str, np.ndarray], selected: np.ndarray) -> dict[str, Any]:
    """Spread of each term over all candidates and over the selected, and the terms' correlations."""
    known = {name: values for name, values in terms.items() if not np.isnan(values).all()}
    return {
        "spread": {name: spread(values) for name, values in known.items()},
        "spread_selected": {name: spread(values[selected]) for name, values in known.items()},
        "correlation": {
            f"{one}-{other}": correlation(known[one], known[other])
            for one, other in itertools.combinations(known, 2)
        },
        "share_shadowed": number(np.mean(known["R"] > 0)) if "R" in known else None,
    }


def describe_signal(signal: Signal, table: pa.Table, estimate: Density | None) -> dict[str, Any]:
    """Quantiles of the signal, what was done to it, and its rank correlation with length and loss."""
    step = max(1, len(signal.values) // _CORRELATED_ROWS)
    raw, adjusted = r(signal.raw[::step]), r(signal.values[::step])
    correlations: dict[str, Any] = {}
    for name in ("num_label_tokens", "loss"):
        other = r(table.column(name).to_numpy()[::step])
        correlations[name] = {"before": correlation(raw, other), "after": correlation(adjusted, other)}
    return {
        "spread": spread(signal.values),
        "length_r2": None if signal.length_r2 is None else number(signal.length_r2),
        "step_r2": None if signal.step_r2 is None else number(signal.step_r2),
        "floored": signal.floored,
        "zero_means": signal.zero_means,
        "rank_correlation": correlations,
        "bandwidth": None if estimate is None else number(estimate.bandwidth),
        "bandwidth_rule": None if estimate is None else estimate.rule,
    }


def describe_controls(
    table: pa.Table, targets: list[str], config: SelectionConfig, budget: Budget, selected: np.ndarray
) -> dict[str, Any]:
    """Share of the selected rows that each control picks too at the same budget, and chance's share."""
    if budget.unit == "none":
        budget = Budget("rows", int(selected.sum()))
    everyone = np.ones(len(selected), bool)
    num_tokens = table.column("num_tokens").to_numpy()
    overlap: dict[str, Any] = {"expected_by_chance": number(selected.mean())}
    for name in CONTROLS:
        unknown = (name == "grand" and not targets) or (name == "el2n" and "el2n" not in table.column_names)
        if name == config.criterion or unknown:
            continue
        score = control_score(name, table, targets, config.seed, selected)
        picked = top_k(score, everyone, num_tokens, budget)
        overlap[name] = number(np.mean(picked[selected]))
    return overlap


def spread(x: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation and quantiles of an array that is not empty."""
    names = ("min", "p05", "p25", "p50", "p75", "p95", "max")
    quantiles = dict(zip(names, map(number, np.quantile(x, _QUANTILES)), strict=True))
    return {"mean": number(x.mean()), "std": number(x.std()), **quantiles}


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation; None where one of the two is constant."""
    if is_constant(x) or is_constant(y):
        return None
    return number(np.corrcoef(x, y)[0, 1])


def number(x: float | np.floating) -> float | None:
    """A float for JSON, which has no NaN."""
    return float(x) if math.isfinite(x) else None
