"""The benchmarks of steps and of precision: what they count, what runs at toy size. No timing is asserted."""

from __future__ import annotations

import csv
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", ["toy", "1b", "8b"])
def test_matrices_are_counted_as_the_model_has_them(name, monkeypatch, tmp_path):
    from step_shapes import SHAPES

    built = []
    monkeypatch.setattr(
        "transformers.PreTrainedModel.save_pretrained", lambda self, folder: built.append(self)
    )
    SHAPES[name].save(tmp_path, torch.device("meta"))
    linear = [m.weight.numel() for m in built[0].modules() if isinstance(m, nn.Linear)]
    assert SHAPES[name].num_linear == sum(linear)
    assert SHAPES[name].num_parameters == sum(p.numel() for p in built[0].parameters() if p.ndim == 2)


def test_operations_are_those_that_torch_counts(tmp_path):
    from step_shapes import SHAPES

    shape = SHAPES["toy"]
    folder, _ = shape.save(tmp_path, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.ones(3, 7, dtype=torch.int64), use_cache=False).logits
    assert counter.get_total_flops() == shape.flops(7, 3, "forward")
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == shape.flops(7, 3, "train") - shape.flops(7, 3, "forward")


def test_steps_run_at_toy_size_and_name_what_does_not_fit(tmp_path, monkeypatch):
    import bench_step
    from step_stage import Stage

    run = Stage.run

    def limited(self, work):
        if self._variant.name == "probed-linear":
            raise torch.OutOfMemoryError
        run(self, work)

    monkeypatch.setattr(Stage, "run", limited)
    monkeypatch.setattr(bench_step, "SMOKE_LENGTHS", (16, 32))
    assert bench_step.main(["--smoke", "--peak-tflops", "1", "--out", str(tmp_path)]) == 0
    with (tmp_path / "bench_step_smoke_cpu.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(bench_step.VARIANTS)
    for row in rows:
        if row["variant"] == "probed-linear":
            assert row["note"] == "out of memory at 16 tokens a row" and row["ms_median"] == ""
        else:
            assert row["note"] == "" and float(row["ratio_median"]) > 0 and float(row["mfu"]) > 0


def test_a_length_past_the_deadline_is_named(tmp_path):
    import bench_step

    assert bench_step.main(["--smoke", "--seconds", "-1", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "bench_step_smoke_cpu.csv").read_text(encoding="utf-8")
    assert text.count("no time left") == 2 * 2 * len(bench_step.VARIANTS)


def test_the_gpu_check_leaves_the_steps_out_where_there_is_no_time(tmp_path, capsys):
    import gpu_check

    assert gpu_check.time_steps(time.monotonic() + 10, tmp_path)
    assert capsys.readouterr().out.startswith("skip  steps: 10 s are left")


def test_the_best_rows_and_what_two_sets_share():
    import bf16_honesty

    assert bf16_honesty.best(np.array([1.0, 3.0, 3.0, 2.0]), 0.5).tolist() == [1, 2]
    assert bf16_honesty.best(np.array([1.0, 3.0]), 0.05).tolist() == [1]
    assert bf16_honesty.overlap(np.array([1, 2, 3, 4]), np.array([4, 9, 1])) == 0.5


def test_a_score_is_compared_by_its_order_alone():
    import bf16_honesty

    values = np.arange(20.0)
    picked = {share: np.arange(4) for share in bf16_honesty.SHARES}
    one = bf16_honesty.Found({("lm_head", "min"): values}, picked)
    other = bf16_honesty.Found({("lm_head", "min"): np.exp(values)}, picked)
    line, last = bf16_honesty.compare(one, other)
    assert line["spearman"] == pytest.approx(1) and line["top_5"] == 1
    assert last["statistic"] == "picked rows" and last["top_50"] == 1
    mirrored = bf16_honesty.Found({("lm_head", "min"): -values}, picked)
    assert bf16_honesty.compare(one, mirrored)[0]["top_20"] == 0
