"""Where a rank writes its numbers while it works, beside its log."""

from __future__ import annotations

from dataclasses import dataclass

from grads_dist.runtime.metrics import Metrics
from grads_dist.runtime.trackers import Trackers


@dataclass(frozen=True)
class Journal:
    """The metrics of this rank and, on rank 0, the trackers of the user's choice; None: nowhere."""

    metrics: Metrics | None = None
    trackers: Trackers | None = None

    def close(self) -> None:
        """Close both."""
        if self.metrics is not None:
            self.metrics.close()
        if self.trackers is not None:
            self.trackers.close()
