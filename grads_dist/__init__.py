"""GrADS data selection: picks the best share of an SFT corpus from per-sample gradients.

    with grads_dist.record(model, targets=["embedding", "lm_head"]) as recording:
        model(**batch).loss.backward()
    recording.statistics()["lm_head"].norm()

`record` reads the samples of any backward pass, `ScoreTableCallback` writes the score table of somebody's own
`transformers.Trainer` run (docs/library.md). Both are loaded on first use: importing this package is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grads_dist.library.callback import ScoreTableCallback
    from grads_dist.library.recording import Recording, record
    from grads_dist.stats.statistics import Statistics

__all__ = ["Recording", "ScoreTableCallback", "Statistics", "record"]

_HOMES = {
    "Recording": "grads_dist.library.recording",
    "ScoreTableCallback": "grads_dist.library.callback",
    "Statistics": "grads_dist.stats.statistics",
    "record": "grads_dist.library.recording",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: the modules behind them import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted([*globals(), *_HOMES])
