"""The CUDA kernels compile for every architecture without spilling, and what is compiled is cached."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import torch
from kernel_emulator import KERNELS

from grads_dist.stats import cuda_driver, cuda_images, nvrtc
from grads_dist.stats.cuda_images import FILES, OUTER_SM90, TILES, compiled_for, macros_of
from grads_dist.stats.cuda_tile import HopperTile, Tile

ARCHITECTURES = os.environ.get("GRADS_DIST_TEST_ARCHITECTURES", "sm_80,sm_90,sm_100").split(",")
"""sm_80,sm_89,sm_90,sm_90a,sm_100,sm_120 for all; three are what there is time for in every run."""
# Registers at most, up to sm_90 and from sm_100 on. 128 is what two blocks of 256 threads leave to each.
REGISTERS = {
    "outer_product_stats": (128, 128),
    "outer_product_stats_total": (216, 224),
    # What ptxas may give 384 threads; the kernel moves some from the copying warpgroup to the others.
    "sm90_outer_product_stats": (168, 168),
    "sm90_outer_product_stats_total": (168, 168),
    "join_partials": (56, 96),
    "row_run_stats": (48, 56),
    "vector_stats": (48, 64),
    "row_sums": (48, 56),
    "softmax_gradient": (48, 48),
    "column_bounds": (48, 48),
}


def assert_lean(report: str, kernels: set[str], architecture: str) -> None:
    """No kernel of ptxas' report spills, waits for each product or uses more registers than written above."""
    assert "Potential Performance Loss" not in report, report
    entries = re.split(r"Compiling entry function '", report)[1:]
    found = {}
    for entry in entries:
        name = entry.partition("'")[0]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        assert stack == stores == loads == "0", f"{name}: {entry}"
        found[name] = int(re.search(r"Used (\d+) registers", entry).group(1))
    assert set(found) == kernels
    for name, registers in found.items():
        limits = REGISTERS[re.sub(r"(_(bf16|fp16|fp32))+$", "", name)]
        limit = limits[int(re.sub(r"\D", "", architecture)) >= 100]
        assert registers <= limit, f"{name}: {registers} registers, {limit} allowed"


def kernels_of(file: str) -> set[str]:
    return set(re.findall(r"^GD_KERNEL\((\w+),", (KERNELS / "cuda" / file).read_text(), re.MULTILINE))


def test_a_spill_or_more_registers_would_be_noticed():
    report = (
        "Compiling entry function 'join_partials' for\n"
        "{} bytes stack frame, {} bytes spill stores, 0 bytes spill loads\nUsed {} registers"
    )
    assert_lean(report.format(0, 0, 56), {"join_partials"}, "sm_90a")
    assert_lean(report.format(0, 0, 96), {"join_partials"}, "sm_100")
    for numbers in ((0, 0, 57), (8, 0, 40), (0, 4, 40)):
        with pytest.raises(AssertionError, match="join_partials"):
            assert_lean(report.format(*numbers), {"join_partials"}, "sm_80")
    with pytest.raises(AssertionError, match="serialized"):
        assert_lean(
            "Potential Performance Loss: wgmma.mma_async instructions are serialized", set(), "sm_90a"
        )


TARGETS = [
    pytest.param(file, target, id=f"{file}-{target}")
    for file in FILES
    for target in dict.fromkeys(compiled_for(file, architecture) for architecture in ARCHITECTURES)
    if target is not None
]


def macros_for(file: str) -> dict[str, int]:
    return macros_of(file, TILES.get(file, (Tile(),))[0])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(("file", "architecture"), TARGETS)
def test_nvcc_compiles_without_spills(file, architecture, tmp_path):
    macros = [f"-D{name}={value}" for name, value in macros_for(file).items()]
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", *macros]
    command += ["-o", str(tmp_path / "out.cubin"), str(KERNELS / "cuda" / file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert_lean(done.stderr, kernels_of(file), architecture)


HEADERS = ("primitives.cuh", "primitives_sm90.cuh", "statistics.cuh", "outer_product.cuh")
needs_nvrtc = pytest.mark.skipif(nvrtc.find_nvrtc() is None, reason="no libnvrtc")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif("GRADS_DIST_TEST_ARCHITECTURES" not in os.environ, reason="with all architectures only")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_wide_tile_of_the_benchmark_does_not_spill(architecture, tmp_path):
    tile = Tile(cols=256, stages=3, blocks_per_multiprocessor=1)
    macros = [f"-D{name}={value}" for name, value in tile.macros().items()]
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", *macros]
    command += ["-o", str(tmp_path / "out.cubin"), str(KERNELS / "cuda" / "outer_product.cu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    kernels = done.stderr.split("Compiling entry function")
    plain = [text for text in kernels if text.startswith(" 'outer_product_stats_bf16'")]
    assert len(plain) == 1 and " 0 bytes spill stores" in plain[0], done.stderr


@needs_nvrtc
@pytest.mark.parametrize(("file", "architecture"), TARGETS)
def test_nvrtc_compiles_without_spills(file, architecture):
    done = nvrtc.find_nvrtc().compile(file, architecture, macros_for(file))
    assert done.image[:4] == b"\x7fELF"
    assert_lean(done.log, kernels_of(file), architecture)


@needs_nvrtc
def test_nvrtc_compiles_ptx_for_devices_it_does_not_know():
    done = nvrtc.find_nvrtc().compile("statistics.cu", "compute_80", {})
    assert b".target sm_80" in done.image and b".entry join_partials" in done.image


@needs_nvrtc
def test_a_compile_error_is_one_line_that_names_the_file():
    with pytest.raises(nvrtc.KernelCompileError) as error:
        nvrtc.find_nvrtc().compile("outer_product.cu", "sm_90", {})
    assert "outer_product.cu for sm_90: " in str(error.value) and "GD_TILE_M" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(nvrtc.KernelCompileError, match="for sm_12: "):
        nvrtc.find_nvrtc().compile("statistics.cu", "sm_12", {})


class FakeCompiler:
    """Stands for an NVRTC: counts what it compiles."""

    path, version, architectures = "libnvrtc.so", (13, 0), (80, 90)

    def __init__(self) -> None:
        self.compiled: list[tuple] = []

    def compile(self, file, architecture, macros):
        self.compiled.append((file, architecture, dict(macros)))
        return nvrtc.Compiled(f"{file} {architecture} {len(self.compiled)}".encode(), "")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A fake NVRTC, an empty cache, and no images built with the package."""
    compiler = FakeCompiler()
    monkeypatch.setenv("GRADS_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: compiler)
    monkeypatch.setattr(cuda_images, "PREBUILT", tmp_path / "prebuilt")
    return compiler


def test_what_is_compiled_is_cached_by_all_that_it_depends_on(compiler, tmp_path, monkeypatch):
    find = cuda_images.find_image
    first = find("outer_product.cu", (9, 0), Tile())
    assert find("outer_product.cu", (9, 0), Tile()) == first
    assert compiler.compiled == [("outer_product.cu", "sm_90", Tile().macros())]
    find("outer_product.cu", (8, 9), Tile())
    find("outer_product.cu", (9, 0), Tile(stages=3))
    find("rows.cu", (9, 0), Tile())
    find("rows.cu", (9, 0), Tile(stages=3))  # has no tile: the same
    compiler.version = (13, 1)
    find("outer_product.cu", (9, 0), Tile())
    texts = nvrtc.source_texts() | {"statistics.cuh": "// changed"}
    monkeypatch.setattr(nvrtc, "source_texts", lambda: texts)
    find("outer_product.cu", (9, 0), Tile())
    assert len(compiler.compiled) == 6
    find(OUTER_SM90, (9, 0), HopperTile())
    assert compiler.compiled.pop() == (OUTER_SM90, "sm_90a", HopperTile().macros())
    files = list((tmp_path / "kernels").iterdir())
    assert len(files) == 7 and all(path.suffix == ".bin" for path in files)


def test_a_cache_that_cannot_be_written_only_costs_time(compiler, tmp_path, caplog):
    (tmp_path / "kernels").write_text("a file where the folder would be")
    assert cuda_images.find_image("rows.cu", (9, 0), Tile()) == b"rows.cu sm_90 1"
    assert "cannot be written" in caplog.text


def test_images_built_with_the_package_come_first(compiler, tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "$3" > "$2"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    files = ["rows.cu", "outer_product.cu", OUTER_SM90]
    assert len(cuda_images.build_images(cuda_images.PREBUILT, ["sm_80"], files)) == 3
    for tile in (Tile(), Tile(stages=3)):
        assert b"outer_product.cu" in cuda_images.find_image("outer_product.cu", (8, 9), tile)
    assert compiler.compiled == []
    assert cuda_images.find_image("rows.cu", (9, 0), Tile()) == b"rows.cu sm_90 1"
    assert len(cuda_images.build_images(cuda_images.PREBUILT, ["sm_90"], [OUTER_SM90])) == 1
    assert OUTER_SM90.encode() in cuda_images.find_image(OUTER_SM90, (9, 0), HopperTile())


def test_nvcc_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(nvrtc.KernelCompileError, match="nvcc cannot be run: No such file"):
        cuda_images.build_images(tmp_path / "out", ["sm_80"], ["rows.cu"])
    (tmp_path / "nvcc").write_text('#!/bin/sh\necho "in file" >&2\necho "x.cu(3): error: what" >&2\nexit 2\n')
    (tmp_path / "nvcc").chmod(0o755)
    with pytest.raises(nvrtc.KernelCompileError, match=r"rows.cu for sm_80: x.cu\(3\): error: what$"):
        cuda_images.build_images(tmp_path / "out", ["sm_80"], ["rows.cu"])


def test_without_a_compiler_there_is_no_image(compiler, monkeypatch):
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: None)
    with pytest.raises(nvrtc.KernelCompileError, match="no NVRTC found to compile rows.cu"):
        cuda_images.find_image("rows.cu", (9, 0), Tile())


def test_a_compiler_older_than_hopper_has_no_image_for_it(compiler):
    compiler.architectures = (75, 80, 86)
    with pytest.raises(nvrtc.KernelCompileError, match="does not compile outer_product_sm90.cu"):
        cuda_images.find_image(OUTER_SM90, (9, 0), HopperTile())
    assert cuda_images.find_image("rows.cu", (9, 0), Tile()) == b"rows.cu compute_86 1"


def test_the_architecture_is_what_the_device_runs():
    supported = (75, 80, 86, 89, 90, 100)
    choose = nvrtc.architecture_for
    assert choose((9, 0), supported) == "sm_90"
    assert choose((8, 7), supported) == "sm_86"
    assert choose((12, 0), supported) == "compute_100"
    with pytest.raises(nvrtc.KernelCompileError, match="nothing that compute capability 70"):
        choose((7, 0), supported)


def test_nvrtc_is_looked_for_in_cuda_home(tmp_path, monkeypatch):
    (tmp_path / "lib64").mkdir()
    library = tmp_path / "lib64" / "libnvrtc.so.13"
    library.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(library) in list(nvrtc.library_paths())


def test_the_sources_ship_with_the_package():
    assert set(nvrtc.source_texts()) == {*FILES, *HEADERS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_there_is_nothing_to_run_on():
    assert cuda_driver.unavailable_reason(torch.device("cpu")) == "cpu is no CUDA device"
    assert cuda_driver.unavailable_reason(torch.device("cuda", 0)) == "torch finds no CUDA device"
