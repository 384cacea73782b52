"""Where a selection comes from, as its files tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grads_dist.data.config import DataConfig
from grads_dist.model.config import ModelConfig
from grads_dist.probe.config import ProbeConfig
from grads_dist.selection.config import SelectionConfig


@dataclass(frozen=True)
class Origin:
    """What a selection was made from; a table that no probe wrote has no model, probe or manifest."""

    selection: SelectionConfig
    data: DataConfig
    model: ModelConfig | None = None
    probe: ProbeConfig | None = None

    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Of the run directory."""
