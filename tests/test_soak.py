"""What the soak calls growth: a leak, but neither the start of a run nor memory that comes and goes."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT

SECONDS = np.arange(0.0, 1800.0)
STEADY = np.full(len(SECONDS), 500.0)


@pytest.fixture
def soak(monkeypatch):
    """The script as a module, with its neighbours importable as when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import soak

    return soak


def test_a_leak_is_growth(soak):
    found = soak.measure_growth(SECONDS, STEADY + SECONDS / 50)
    assert found.share > soak.ALLOWED_GROWTH
    assert found.slope_mib_per_hour == pytest.approx(72)


def test_the_start_and_what_comes_and_goes_are_none(soak):
    warming = np.minimum(SECONDS, 300) - 300
    found = soak.measure_growth(SECONDS, STEADY + warming + 40 * (SECONDS % 60 > 50))
    assert found.share == 0
