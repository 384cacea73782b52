"""The library's documentation is true: doctests, docs/library.md, the example; and the import is quick."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, clean_environment

import grads_dist
import grads_dist.library

MODULES = [module.name for module in pkgutil.iter_modules(grads_dist.library.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(f"grads_dist.library.{name}")
    assert doctest.testmod(module).failed == 0


def test_record_has_a_doctest():
    assert doctest.testmod(importlib.import_module("grads_dist.library.recording")).attempted > 3


def test_blocks_of_the_page():
    """Code runs, and sessions give what they show."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        if not block.startswith(">>>"):
            exec(compile(block, f"block {number}", "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(block, names, f"block {number}", None, None)
        runner = doctest.DocTestRunner()
        runner.run(test, clear_globs=False)
        names.update(test.globs)
        assert runner.failures == 0, block
    assert len(blocks) > 6


def test_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score_while_training.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "score_while_training.py"), run_name="__main__")
    printed = re.findall(r"^row (\d+): \d\d\+\d\d=\d\d$", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 5
    assert pq.read_table(tmp_path / "run" / "scores.parquet").num_rows == 72


def test_the_import_is_quick():
    """Neither torch nor transformers is imported until a public name is asked for."""
    code = (
        "import sys, grads_dist; dir(grads_dist); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=clean_environment()).returncode == 0


def test_public_names():
    assert set(grads_dist.__all__) <= set(dir(grads_dist))
    for name in grads_dist.__all__:
        assert getattr(grads_dist, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        grads_dist.nothing  # noqa: B018


def test_benchmark_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_callback

    bench_callback.main(["--smoke", "--epochs", "1", "--rows", "8", "--out", str(tmp_path)])
    lines = (tmp_path / "bench_callback_smoke.csv").read_text().splitlines()
    assert lines[0].split(",") == list(bench_callback.COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == [v.name for v in bench_callback.VARIANTS]
