"""What is to run on a GPU runs on a pretended device, with the CPU's numbers: device_worker.py.

A tensor that was made on the wrong side, or read there, is an error here as it is on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kernel_emulator import missing
from tiny import ARCHITECTURES
from workspace import run_python

WORKER = Path(__file__).with_name("device_worker.py")
MODELS = [f"{name}, {how}" for name in ARCHITECTURES for how in ("frozen", "trained")]
KERNELS = [f"{name} on the kernels" for name in ("llama", "gemma2", "mixtral")]
OTHERS = ["what a GPU refuses", "a whole run", "record", "search"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("device")
    done = run_python(str(WORKER), str(folder), timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", [*MODELS, *KERNELS, *OTHERS])
def test_on_a_device(results: dict[str, str | None], name: str) -> None:
    if name in KERNELS and missing() is not None:
        pytest.skip(str(missing()))
    assert results[name] is None, results[name]


def test_all_are_named(results: dict[str, str | None]) -> None:
    named = {*MODELS, *OTHERS, *(KERNELS if missing() is None else ())}
    assert set(results) == named
