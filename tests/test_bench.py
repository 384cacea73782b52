"""The benchmarks of the probe run at toy size and refuse wrong numbers. No timing is asserted."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment

from grads_dist.stats.statistics import Statistics

SCRIPT = ROOT / "benchmarks" / "bench_probe.py"
NUMBERS = [
    "samples_per_s",
    "tokens_per_s",
    "ratio_median",
    "ratio_p25",
    "ratio_p75",
    "ratio_min",
    "ratio_max",
]
PROVENANCE = ["threads", "cpu_model", "torch", "deepspeed", "transformers", "commit", "date", "model_params"]
VARIANTS = {
    *("plain", "session", "probed", "probed-linear", "frozen", "frozen-linear", "frozen-head", "features"),
    *("loop", "loop-linear", "vmap", "vmap-linear"),
}


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with its neighbours importable as when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_probe

    return bench_probe


@pytest.fixture
def trial(bench):
    import trial

    return trial


def read(folder: Path, name: str = "bench_probe") -> dict[str, dict[str, str]]:
    with (folder / f"{name}_smoke.csv").open(encoding="utf-8", newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_smoke_run_has_a_whole_row_for_every_variant(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, env=clean_environment(), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(tmp_path)
    assert set(rows) == VARIANTS
    for name, row in rows.items():
        assert row["note"] == "" and row["computes"]
        for column in NUMBERS:
            assert float(row[column]) > 0, (name, column)
        for column in PROVENANCE:
            assert row[column] == rows["plain"][column] != ""
        assert float(row["ratio_min"]) <= float(row["ratio_median"]) <= float(row["ratio_max"])
        assert row["peak_mib"] == ""
        assert int(row["num_samples"]) == 16 and int(row["num_batches"]) >= 2
    assert {rows["plain"][c] for c in NUMBERS[2:]} == {"1"}
    assert all(name in done.stdout for name in VARIANTS)


def test_memory_is_measured_and_a_rival_that_fails_is_reported(tmp_path, bench, monkeypatch):
    monkeypatch.setattr("variants.VMAP_GRADIENT_BYTES", 1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bench.main(["--smoke", "--memory", "--variants", "plain,vmap", "--out", str(tmp_path)])
    rows = read(tmp_path)
    assert set(rows) == {"plain", "vmap"}
    assert float(rows["plain"]["peak_mib"]) > 0
    assert rows["vmap"]["note"].startswith("unrun: one sample's gradients take")
    assert {rows["vmap"][c] for c in [*NUMBERS, "peak_mib"]} == {""}


def statistics(count: int = 3) -> Statistics:
    values = torch.arange(1, count + 1, dtype=torch.float64)
    return Statistics(values, values.square(), -values, 2 * values, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("field", ["sum", "sumsq", "min", "max", "nonfinite"])
def test_wrong_numbers_are_refused(trial, field):
    truth = statistics()
    trial.check_equal(
        {"loop-linear": {"lm_head": truth}, "probed": {"lm_head": statistics()}}, "loop-linear", 1e-4, {}
    )
    wrong = getattr(truth, field).clone()
    wrong[1] += 1
    faulty = {"loop-linear": {"lm_head": truth}, "probed": {"lm_head": replace(truth, **{field: wrong})}}
    with pytest.raises(AssertionError, match="probed"):
        trial.check_equal(faulty, "loop-linear", 1e-4, {})


def test_what_a_rival_does_not_give_is_not_compared(trial):
    norms = replace(statistics(), sum=torch.full((3,), torch.nan))
    found = {"loop": {"lm_head": statistics()}, "ghost": {"lm_head": norms}}
    trial.check_equal(found, "loop", 1e-4, {"ghost": ["sumsq"]})
    with pytest.raises(AssertionError, match="ghost: sum of lm_head"):
        trial.check_equal(found, "loop", 1e-4, {})


def test_unknown_variant_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--variants", "plain,sloop"])
    assert "'sloop' is not known" in capsys.readouterr().err


def test_neighbours_run_and_say_what_they_compute(tmp_path, bench, monkeypatch):
    import bench_neighbours

    # As where they are not installed, whatever this environment has.
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    monkeypatch.setitem(sys.modules, "bergson.collector.collector", None)
    bench_neighbours.main(["--smoke", "--out", str(tmp_path)])
    rows = read(tmp_path, "bench_neighbours")
    assert set(rows) == {variant.name for variant in bench_neighbours.VARIANTS}
    rivals = {name for name in rows if name.startswith(("opacus", "bergson"))}
    for name, row in rows.items():
        assert row["computes"]
        if name in rivals:
            assert row["note"].startswith("unrun: ") and row["ratio_median"] == ""
        else:
            assert row["note"] == "" and float(row["ratio_median"]) > 0
