"""How an estimate is made: what is no part of the run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from grads_dist.errors import ConfigError
from grads_dist.estimate.hardware import check_hardware


@dataclass(frozen=True)
class Options:
    """The flags of `grads-dist estimate`.

    Args:
        sample: rows of the corpus that are tokenized.
        ranks: ranks of the planned run; None: as many as this was started with.
        hardware: what every rank has, a name of the table; None: this machine's device.
        calibrate: time real batches on this machine.
        as_json: print JSON.
    """

    sample: int = 2000
    ranks: int | None = None
    hardware: str | None = None
    calibrate: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        for name in ("sample", "ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is not allowed; allowed: a whole number of at least 1")
        if self.hardware is not None:
            check_hardware(self.hardware)
