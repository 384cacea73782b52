"""Loading and launching through the driver's interface, with a driver that runs the emulated kernels."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import kernel_checks as checks
import pytest
import torch
from kernel_emulator import KERNELS, build, missing

from grads_dist.stats import cuda_driver, cuda_launch
from grads_dist.stats.cuda_images import OUTER_SM90, AnyTile
from grads_dist.stats.cuda_params import SecondStageParams
from grads_dist.stats.cuda_tile import HopperTile, Tile
from grads_dist.stats.nvrtc import KernelCompileError

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SOURCE = Path(__file__).with_name("fake_cuda_driver.cpp")
DEVICE, STREAM = torch.device("cuda", 0), 4711


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", f"-I{KERNELS / 'emulator'}"]
    command += [str(SOURCE), "-ldl", "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Callable[..., bytes]:
    """Images by file and tile, built when they are asked for."""
    folder, built = tmp_path_factory.mktemp("images"), {}

    def find_image(file: str, capability: tuple[int, int], tile: AnyTile) -> bytes:
        assert capability[0] >= 8
        if (file, tile) not in built:
            built[file, tile] = str(build(file, tile, folder)).encode()
        return built[file, tile]

    return find_image


@pytest.fixture
def make_launcher(library, images, monkeypatch) -> Callable[..., cuda_driver.DeviceLauncher]:
    """Launchers for devices of a compute capability, and their arguments."""

    def make(*arguments, capability: tuple[int, int] = (8, 0)) -> cuda_driver.DeviceLauncher:
        properties = SimpleNamespace(
            multi_processor_count=2,
            shared_memory_per_multiprocessor=228 << 10,
            major=capability[0],
            minor=capability[1],
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        launcher = cuda_driver.DeviceLauncher(DEVICE, *arguments)
        monkeypatch.setattr(cuda_launch, "launcher_for", lambda _: launcher)
        return launcher

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(library))
    monkeypatch.setattr(cuda_driver, "find_image", images)
    return make


@pytest.fixture
def launcher(make_launcher) -> cuda_driver.DeviceLauncher:
    return make_launcher()


def state(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def test_results_come_through_the_driver(launcher, library):
    checks.check_total("cpu", (70, 30), lengths=[17, 0, 33])
    checks.check_embedding("cpu")
    checks.check_column_bounds("cpu", 40)
    driver = state(library)
    assert ctypes.c_void_p.in_dll(driver, "last_stream").value == STREAM
    assert driver.num_current_contexts() == 0, "a context was left current"


def test_hopper_gets_its_own_kernel_and_tensor_maps(make_launcher, library):
    launcher, loaded = make_launcher(capability=(9, 0)), []
    assert launcher.hopper == HopperTile()
    launch = launcher.launch
    launcher.launch = lambda file, *rest: loaded.append(file) or launch(file, *rest)
    checks.check_total("cpu", (70, 30), lengths=[17, 0, 33])
    assert loaded.count(OUTER_SM90) == 2 and "outer_product.cu" not in loaded
    assert state(library).num_current_contexts() == 0, "a context was left current"
    # Rows of 24 bytes.
    with pytest.raises(cuda_driver.CudaError, match="cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE"):
        launcher.tensor_map(torch.zeros(4, 12, dtype=torch.bfloat16), 64)


def test_other_devices_and_a_named_tile_get_mma_sync(make_launcher):
    assert make_launcher(capability=(8, 9)).hopper is None
    assert make_launcher(capability=(10, 0)).hopper is None
    assert make_launcher(Tile(), capability=(9, 0)).hopper is None


def test_hopper_does_without_its_kernel_where_it_cannot_be_compiled(make_launcher, monkeypatch, caplog):
    def find_image(file: str, *_: object) -> bytes:
        raise KernelCompileError(f"kernels: no NVRTC found to compile {file} with")

    monkeypatch.setattr(cuda_driver, "find_image", find_image)
    assert make_launcher(capability=(9, 0)).hopper is None
    assert f"no NVRTC found to compile {OUTER_SM90} with; outer_product.cu is used" in caplog.text


def test_images_are_loaded_once(launcher, images, monkeypatch):
    loaded = []
    monkeypatch.setattr(cuda_driver, "find_image", lambda *args: loaded.append(args[0]) or images(*args))
    for _ in range(2):
        checks.check_vector_nonfinite("cpu")
    assert sorted(loaded) == ["rows.cu", "statistics.cu"]


def test_failures_carry_the_drivers_name(launcher, library):
    with pytest.raises(cuda_driver.CudaError, match="cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"):
        launcher.launch("statistics.cu", "no_such_kernel", SecondStageParams(), (1, 1), 32)
    with pytest.raises(cuda_driver.CudaError, match="cuInit: CUDA_ERROR_INVALID_VALUE"):
        cuda_driver.Driver().call("cuInit", 1)
    assert state(library).num_current_contexts() == 0


def test_reasons_not_to_run(library, monkeypatch):
    reason = cuda_driver.unavailable_reason
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert reason(DEVICE) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(cuda_driver, "find_nvrtc", lambda: None)
    assert reason(DEVICE).startswith("no libnvrtc")
    monkeypatch.setattr(cuda_driver, "find_nvrtc", lambda: object())
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno_such_driver.so.1")
    assert reason(DEVICE) == "no libno_such_driver.so.1"
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(library))
    assert reason(DEVICE) is None


def test_building_images_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import grads_dist.stats.cuda_images"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
