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
from grads_dist.selection.labels import Labels
from grads_dist.selection.pick import top_k
from grads_dist.selection.ranks import is_constant, r
from grads_dist.selection.sampling import sample
from grads_dist.selection.signal import Signal

_QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
# Quantiles and correlations are found on about this many evenly spaced rows: more would change no digit that
# is read.
_MOST_ROWS = 1_000_000
_MOST_STRATA = 100

COMPARED_ROWS = 200_000
"""Rows that the controls and rank correlations are found on, at most: a share is then sure to about 0.003."""


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
    """Shares of the candidates' rows and tokens that are selected, and the mean lengths and losses."""
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
    if "loss" in table.column_names:
        loss = table.column("loss").to_numpy()
        result["loss"] = {
            "mean_all": number(loss.mean(dtype=np.float64)),
            "mean_selected": number(loss[selected].mean(dtype=np.float64)),
        }
    return result


def describe_strata(strata: Labels, selected: np.ndarray) -> dict[str, Any]:
    """Shares of each stratum in the candidates and in the selected rows; the 100 largest strata.

    Args:
        strata: of the candidates.
        selected: bool [n].
    """
    counts = np.bincount(strata.codes, minlength=len(strata.names))
    picked = np.bincount(strata.codes[selected], minlength=len(strata.names))
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    shares = {
        strata.names[k]: {
            "candidates": int(counts[k]),
            "selected": int(picked[k]),
            "share_candidates": number(counts[k] / counts.sum()),
            "share_selected": number(picked[k] / max(1, picked.sum())),
        }
        for k in order[:_MOST_STRATA].tolist()
    }
    return {"number": len(order), "largest": shares}


def describe_terms(terms: dict[str, np.ndarray], selected: np.ndarray) -> dict[str, Any]:
    """Spread of each term over all candidates and over the selected, and the terms' correlations."""
    known = {name: values for name, values in terms.items() if not np.isnan(values).all()}
    step = max(1, len(selected) // _MOST_ROWS)
    return {
        "spread": {name: spread(values) for name, values in known.items()},
        "spread_selected": {name: spread(values[selected]) for name, values in known.items()},
        "correlation": {
            f"{one}-{other}": correlation(known[one][::step], known[other][::step])
            for one, other in itertools.combinations(known, 2)
        },
        "share_shadowed": number(np.mean(known["R"] > 0)) if "R" in known else None,
    }


def describe_signal(signal: Signal, table: pa.Table, estimate: Density | None) -> dict[str, Any]:
    """Quantiles of the signal, what was done to it, and its rank correlation with length and loss."""
    step = max(1, len(signal.values) // COMPARED_ROWS)
    raw, adjusted = r(signal.raw[::step]), r(signal.values[::step])
    correlations: dict[str, Any] = {"rows": len(raw)}
    for name in ("num_label_tokens", "loss"):
        if name not in table.column_names:
            continue
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
    """Share of the selected rows that each control picks too, and chance's share.

    Looks at a seeded sample of at most `COMPARED_ROWS` candidates.
    """
    overlap: dict[str, Any] = {"expected_by_chance": number(selected.mean())}
    index = table.column("index").to_numpy()
    rows = sample(np.arange(len(index)), index, COMPARED_ROWS, config.seed, "controls")
    if len(rows) < len(index):
        table, selected = table.take(rows), selected[rows]
    for name in CONTROLS:
        if name == config.criterion or not _is_known(name, table, targets):
            continue
        score = control_score(name, table, targets, config.seed, selected)
        overlap[name] = picked_too(score, table.column("num_tokens").to_numpy(), budget, selected)
    return overlap


def picked_too(
    score: np.ndarray, num_tokens: np.ndarray, budget: Budget, selected: np.ndarray
) -> float | None:
    """Share of the selected rows that are among the best by `score`: of as many rows, or as many tokens.

    Args:
        score: float64 [n].
        num_tokens: int [n].
        budget: of the selection, which says what is counted.
        selected: bool [n].
    """
    if not selected.any():
        return None
    limit = Budget("rows", int(selected.sum()))
    if budget.unit == "tokens":
        limit = Budget("tokens", int(num_tokens[selected].sum(dtype=np.int64)))
    picked = top_k(score, np.ones(len(score), bool), num_tokens, limit)
    return number(np.mean(picked[selected]))


def _is_known(control: str, table: pa.Table, targets: list[str]) -> bool:
    if control in ("loss", "el2n"):
        return control in table.column_names
    has_norms = all(f"{target}.sumsq" in table.column_names for target in targets)
    return control != "grand" or (bool(targets) and has_norms)


def spread(x: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, extremes and quantiles of an array that is not empty."""
    step = max(1, len(x) // _MOST_ROWS)
    quantiles = map(number, np.quantile(x[::step], list(_QUANTILES.values())))
    return {
        "mean": number(x.mean()),
        "std": number(x.std()),
        "min": number(x.min()),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
        "max": number(x.max()),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation; None where one of the two is constant."""
    if is_constant(x) or is_constant(y):
        return None
    return number(np.corrcoef(x, y)[0, 1])


def number(x: float | np.floating) -> float | None:
    """A float for JSON, which has no NaN."""
    return float(x) if math.isfinite(x) else None
