"""The rows that a criterion chooses within the budget."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from grads_dist.errors import ConfigError
from grads_dist.selection.budget import Budget, resolve_budget
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import control_score
from grads_dist.selection.near_duplicates import NearDuplicates
from grads_dist.selection.pick import pick
from grads_dist.selection.ranks import ranking
from grads_dist.selection.scored import Scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was chosen of n candidate rows."""

    score: np.ndarray
    """float64 [n], what a row is worth."""

    value: np.ndarray
    """float64 [n], what the pick ordered the rows by, best highest."""

    allowed: np.ndarray
    """bool [n], rows that could be picked."""

    selected: np.ndarray
    """bool [n], rows that were."""

    budget: Budget
    """How much was asked for."""

    distinct: bool | None
    """Whether certainly no two selected rows are near-duplicates; None without `dedup_threshold`."""


def choose(
    scored: Scored,
    num_scored: int,
    config: SelectionConfig,
    targets: list[str],
    relevance: np.ndarray | None = None,
) -> Choice:
    """Rank the candidates by the configured criterion and pick within the budget.

    Args:
        scored: the candidates.
        num_scored: rows of the score table, which a fraction is of.
        config: criterion, budget, pick, `dedup_threshold`, seed.
        targets: probed targets, for the control `grand`.
        relevance: closeness of the candidates to the target set, for `rds` and `less`.

    Raises:
        ConfigError: nothing can be picked, or a control lacks a column.
    """
    budget = resolve_budget(config, num_scored)
    choice = None
    if scored.terms is not None and scored.criterion is not None:
        choice = _choose(scored, scored.terms.score, scored.criterion.eligible, budget, config)
    if config.criterion != "grads":
        if choice is not None and budget.unit == "none":
            _check(choice, scored, config)
            budget = Budget("rows", int(choice.selected.sum()))
        reference = None if choice is None else choice.selected
        score = control_score(config.criterion, scored.table, targets, config.seed, reference, relevance)
        if config.criterion == "length_matched_random":
            # Any other rule would change the lengths.
            scored = replace(scored, strata=None)
            config = replace(config, pick="topk", dedup_threshold=None)
        choice = _choose(scored, score, np.ones(len(score), bool), budget, config)
    assert choice is not None
    _check(choice, scored, config)
    return choice


def _choose(
    scored: Scored, score: np.ndarray, eligible: np.ndarray, budget: Budget, config: SelectionConfig
) -> Choice:
    if config.dedup_threshold is None or scored.graph is None:
        picked = pick(scored, score, eligible, budget, config)
        return Choice(score, picked.value, eligible, picked.selected, budget, None)
    near = NearDuplicates(scored.graph, scored.points, config.dedup_threshold)
    left = near.drop(score, eligible)
    allowed, distinct, checked = left.kept, left.exact, np.zeros(len(score), bool)
    while True:
        picked = pick(scored, score, allowed, budget, config)
        if distinct:
            break
        # The graph missed some near neighbours: what is picked is checked, and what is dropped is replaced.
        too_close = near.check(score, picked.selected, checked)
        if too_close is None:
            logger.warning(
                "dedup_threshold: %d rows are too many to check each other, and an approximate graph misses "
                "some near-duplicates",
                picked.selected.sum(),
            )
            break
        if len(too_close) == 0:
            distinct = True
            break
        allowed[too_close] = False
        # Rows that are picked no more are compared anew if they come back.
        checked = picked.selected & allowed
    return Choice(score, picked.value, allowed, picked.selected, budget, distinct)


def _check(choice: Choice, scored: Scored, config: SelectionConfig) -> None:
    num_allowed = int(choice.allowed.sum())
    if num_allowed == 0:
        raise ConfigError(
            f"selection.zscore: no row has a signal within {config.zscore}; allowed: a larger number"
        )
    if not choice.selected.any():
        order = ranking(choice.value)
        best = order[choice.allowed[order]][0]
        raise ConfigError(
            f"selection.tokens: {config.tokens} is less than the {scored.num_tokens[best]} tokens "
            "of the best row; allowed: at least these"
        )
    if choice.budget.unit == "rows" and choice.budget.limit > num_allowed:
        logger.warning(
            "budget: %d rows asked for, all %d that can be picked are taken", choice.budget.limit, num_allowed
        )
