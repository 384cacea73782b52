"""The GPU check where there is no GPU: what it says, its comparisons on the emulator, its timing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_emulator import SMALL_HOPPER, EmulatedLauncher, missing

from grads_dist.stats import backend, cuda_launch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return gpu_check


@pytest.fixture
def emulated(tmp_path, monkeypatch) -> EmulatedLauncher:
    """CPU tensors go to the emulator where the cuda backend is forced."""
    launcher = EmulatedLauncher(tmp_path)
    monkeypatch.setattr(cuda_launch, "launcher_for", lambda _: launcher)
    monkeypatch.setattr(backend, "unavailable_reason", lambda _: None)
    backend._choose.cache_clear()
    yield launcher
    backend._choose.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu_check.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "gpu_check: nothing was run: torch finds no CUDA device\n"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_its_comparisons_run(gpu_check, emulated, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    # Every third: the sets are those of test_cuda_kernels.py.
    cases = [*gpu_check.check_cases("cpu", large=False), *gpu_check.head_cases("cpu")]
    assert gpu_check.run_all(iter(cases[::3])) == 0
    names = {name.split(" ")[0] for name, _ in cases}
    assert names >= {
        "check_outer",
        "check_total",
        "repeats",
        "softmax",
        "embedding",
        "vectors",
        "column",
        "head,",
    }
    backend._choose.cache_clear()


def test_a_failure_is_counted_and_shown(gpu_check, capsys):
    def broken() -> None:
        raise AssertionError("two is not one")

    assert gpu_check.run_all(iter([("good", lambda: None), ("bad", broken)])) == 1
    said = capsys.readouterr().out
    assert "ok    good" in said and "FAIL  bad" in said and "two is not one" in said


@pytest.fixture
def gpu_timing(gpu_check, monkeypatch):
    import gpu_timing

    def run_once(run) -> float:
        run()
        return 2.0

    monkeypatch.setattr(gpu_timing, "milliseconds", run_once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return gpu_timing


def test_rates_and_what_does_not_fit(gpu_timing):
    def too_large() -> None:
        raise torch.OutOfMemoryError

    variants = {
        "base": gpu_timing.Variant(lambda: None, flops=2e9),
        "large": gpu_timing.Variant(too_large),
        "copy": gpu_timing.Variant(lambda: None, bytes=4e6),
    }
    labels = {"operation": "x", "p": 1, "d": 2, "lengths": "1 x 1"}
    base, large, copy = gpu_timing.time_case(labels, variants)
    assert (base["ms"], base["tflops"], base["gb_per_s"], base["ratio"]) == (2.0, 1.0, None, 1.0)
    assert copy["gb_per_s"] == 2.0 and copy["tflops"] is None
    assert large["ms"] is None and large["note"] == "out of memory"
    assert all(set(row) == set(gpu_timing.COLUMNS) for row in (base, large, copy))


def test_cases_past_the_deadline_are_named(gpu_timing):
    rows = list(gpu_timing.measure(torch.device("cpu"), deadline=0.0))
    assert len(rows) == 3 * len(gpu_timing.BATCHES) + 3
    assert all(row["note"] == "no time left" and row["ms"] is None for row in rows)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_what_is_timed_runs(gpu_timing, emulated, monkeypatch):
    for name in ("mma_launcher", "wide_launcher"):
        monkeypatch.setattr(gpu_timing, name, lambda _: emulated)
    hopper = emulated.with_hopper(SMALL_HOPPER)
    monkeypatch.setattr(cuda_launch, "launcher_for", lambda _: hopper)
    monkeypatch.setattr(gpu_timing, "WARM_UP", 1)
    device = torch.device("cpu")
    found = {
        name: list(gpu_timing.time_case({}, variants))
        for name, variants in {
            "uniform": gpu_timing.outer_product_variants(device, (70, 30), [5, 5]),
            "ragged": gpu_timing.outer_product_variants(device, (70, 30), [5, 3]),
            "rows": gpu_timing.row_variants(device, [5, 3], 12),
            "head": gpu_timing.head_variants(device, [5, 3], 40),
            "head pass": gpu_timing.head_pass_variants(device, [5, 3], 40, 12),
        }.items()
    }
    assert [len(rows) for rows in found.values()] == [9, 8, 5, 4, 3]
    assert all(row["note"] is None for rows in found.values() for row in rows)
