"""The benchmark of the probe runs at toy size and refuses wrong numbers. No timing is asserted."""

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


def read(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "bench_probe_smoke.csv").open(encoding="utf-8", newline="") as file:
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
def test_wrong_numbers_are_refused(bench, field):
    truth = statistics()
    bench.check_equal({"loop-linear": {"lm_head": truth}, "probed": {"lm_head": statistics()}})
    wrong = getattr(truth, field).clone()
    wrong[1] += 1
    faulty = {"loop-linear": {"lm_head": truth}, "probed": {"lm_head": replace(truth, **{field: wrong})}}
    with pytest.raises(AssertionError, match="probed"):
        bench.check_equal(faulty)


def test_unknown_variant_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--variants", "plain,sloop"])
    assert "'sloop' is not known" in capsys.readouterr().err
