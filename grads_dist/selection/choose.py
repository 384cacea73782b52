"""The rows that a criterion chooses within the budget."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from grads_dist.errors import ConfigError
from grads_dist.selection.budget import Budget, resolve_budget
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import control_score
from grads_dist.selection.pick import keep_distinct, top_k
from grads_dist.selection.ranks import ranking
from grads_dist.selection.scored import Scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was chosen of n candidate rows."""

    score: np.ndarray
    """float64 [n], what ranked the rows."""

    allowed: np.ndarray
    """bool [n], rows that could be picked."""

    selected: np.ndarray
    """bool [n], rows that were."""

    budget: Budget
    """How much was asked for."""


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
        config: criterion, budget, `dedup_threshold`, seed.
        targets: probed targets, for the control `grand`.
        relevance: closeness of the candidates to the target set, for `rds` and `less`.

    Raises:
        ConfigError: nothing can be picked, or a control lacks a column.
    """
    budget = resolve_budget(config, num_scored)
    choice = None
    if scored.terms is not None and scored.criterion is not None:
        choice = _pick(scored, scored.terms.score, scored.criterion.eligible, budget, config)
    if config.criterion != "grads":
        if choice is not None and budget.unit == "none":
            budget = Budget("rows", int(choice.selected.sum()))
        reference = None if choice is None else choice.selected
        score = control_score(config.criterion, scored.table, targets, config.seed, reference, relevance)
        choice = _pick(scored, score, np.ones(len(score), bool), budget, config)
    assert choice is not None
    _check(choice, scored, config)
    return choice


def _pick(
    scored: Scored, score: np.ndarray, eligible: np.ndarray, budget: Budget, config: SelectionConfig
) -> Choice:
    allowed = eligible
    if config.dedup_threshold is not None and scored.graph is not None:
        allowed = keep_distinct(score, eligible, scored.graph, config.dedup_threshold)
    return Choice(score, allowed, top_k(score, allowed, scored.num_tokens, budget), budget)


def _check(choice: Choice, scored: Scored, config: SelectionConfig) -> None:
    num_allowed = int(choice.allowed.sum())
    if num_allowed == 0:
        raise ConfigError(
            f"selection.zscore: no row has a signal within {config.zscore}; allowed: a larger number"
        )
    if not choice.selected.any():
        order = ranking(choice.score)
        best = order[choice.allowed[order]][0]
        raise ConfigError(
            f"selection.tokens: {config.tokens} is less than the {scored.num_tokens[best]} tokens "
            "of the best row; allowed: at least these"
        )
    if choice.budget.unit == "rows" and choice.budget.limit > num_allowed:
        logger.warning(
            "budget: %d rows asked for, all %d that can be picked are taken", choice.budget.limit, num_allowed
        )
