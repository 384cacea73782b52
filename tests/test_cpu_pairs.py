"""The CPU kernel that multiplies bfloat16 in pairs of tokens: its primitive, its machine code, its build."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grads_dist.stats import native

ROOT = Path(__file__).resolve().parent.parent
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only")
TINY = 2.0**-126
"""The smallest number that is not denormal, in bfloat16 as in float32."""


@pytest.mark.skipif("widebf16" not in native.variants(), reason="only where widebf16 runs")
@pytest.mark.parametrize(
    ("b", "a", "expected"),
    [
        ([3.0], [5.0], 15.0),
        ([3.0, 2.0], [5.0, 7.0], 29.0),
        ([3.0, 2.0, 1.0], [5.0, 7.0, 11.0], 40.0),
        # The second token of a pair is added first: the 1 is lost beside 2^24.
        ([2.0**12, 0.0, 2.0**12, 1.0], [2.0**12, 0.0, -(2.0**12), 1.0], 0.0),
        # To the nearest, to even where there are two: 2^24 + 3 lies between 2^24 + 2 and 2^24 + 4.
        ([3.0, 2.0**12], [1.0, 2.0**12], 2.0**24 + 4),
        # A product alone may be too small or too large for float32, because it is not rounded by itself.
        ([TINY, 1.0], [1.0, TINY], 2 * TINY),
        ([2.0**64, 2.0**64], [-(2.0**64), 2.0**63], -(2.0**127)),
        # Denormal factors and denormal sums are zeros.
        ([TINY / 2, 1.0], [2.0**60, 1.0], 1.0),
        ([TINY, 0.0], [0.5, 1.0], 0.0),
        ([TINY, 1.0], [1.5, -TINY], 0.0),
    ],
)
def test_the_emulated_primitive_is_that_of_the_instruction(b, a, expected):
    b, a = (torch.tensor(x).bfloat16()[:, None] for x in (b, a))
    assert native.outer_product_stats(b, a, [len(b)], None, None, "widebf16")[3].item() == expected


def loops(disassembly, instruction):
    """Bodies of the innermost loops in which an instruction occurs."""
    lines = [re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in disassembly.splitlines()]
    code = [line[2] for line in lines if line]
    index = {line[1]: i for i, line in enumerate(line for line in lines if line)}
    found = []
    for i, text in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+) ", text)
        begin = index.get(jump[1], i) if jump else i
        if begin >= i:
            continue
        body = code[begin : i + 1]
        inner = any(re.match(r"(j\w+|ret|call)\b", line) for line in body[:-1])
        if not inner and any(line.startswith(instruction) for line in body):
            found.append(body)
    return found


@on_x86
@pytest.mark.skipif(not (shutil.which("objdump") and shutil.which("g++")), reason="needs objdump and g++")
def test_its_loop_is_products_and_nothing_is_spilled(tmp_path):
    """24 products, 2 vectors of A, 12 columns of B, 3 lines ahead for two tokens of a tile of 12 x 32."""
    source = ROOT / "kernels" / "cpu" / "variant.cpp"
    macros = ["-DGD_VARIANT=x", "-DGD_LANES=16", "-DGD_ROWS=12", "-DGD_BF16_PAIRS"]
    flags = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi", "-mavx512bf16"]
    command = ["g++", *flags, *macros, "-c", str(source), "-o", "pairs.o"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "unrecognized command" in built.stderr:
        pytest.skip("g++ does not know -mavx512bf16")
    assert built.returncode == 0, built.stderr
    command = ["objdump", "-d", "--no-show-raw-insn", "pairs.o"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    bodies = loops(text, "vdpbf16ps")
    assert bodies
    for body in bodies:
        products = [line for line in body if line.startswith("vdpbf16ps")]
        assert len(products) == 24 and len({line.split(",")[-1] for line in products}) == 24
        assert not [line for line in body if "%rsp" in line or "%rbp" in line]
        assert len(body) <= 24 + 2 + 12 + 8


COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *{refused}*) echo "unrecognized command-line option" >&2; exit 1;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo > "$2"; shift; done
"""


@on_x86
@pytest.mark.parametrize(
    ("refused", "kept"),
    [
        ("nothing", {"avx512bf16", "amx"}),
        ("-mavx512bf16", set()),
        ("-DGD_AVX512", set()),
        ("-mamx", {"avx512bf16"}),
        ("-DGD_AMX", {"avx512bf16"}),
    ],
)
def test_a_compiler_that_does_not_know_it_builds_the_rest(tmp_path, refused, kept):
    """Neither its flag nor, in some, its name for the processor's ability."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "kernels" / "cpu", tmp_path / "kernels" / "cpu")
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(log=tmp_path / "log", refused=refused))
    compiler.chmod(0o755)
    environment = {**os.environ, "CC": str(compiler), "CXX": str(compiler)}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and list(tmp_path.glob("out/grads_dist/_cpu_kernels*.so")), done.stderr
    *_, dispatch, linked = (tmp_path / "log").read_text().splitlines()
    assert "widebf16/" in linked and "wideamx/" in linked and "dispatch/" in linked
    assert {name for name in ("avx512bf16", "amx") if f"/{name}/" in linked} == kept
    # What is linked last says which of them there are.
    assert {name for name in ("avx512bf16", "amx") if f"-DGD_{name.upper()}=1" in dispatch} == kept
    assert ("built without it" in done.stdout + done.stderr) == (len(kept) < 2)
