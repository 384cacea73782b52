"""Loads and launches compiled kernels through the CUDA driver, in torch's context and on its stream."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from grads_dist.errors import GradsDistError
from grads_dist.stats.cuda_images import OUTER_SM90, PREBUILT, find_image
from grads_dist.stats.cuda_tensor_map import encode_tensor_map
from grads_dist.stats.cuda_tile import HopperTile, Tile, tile_for
from grads_dist.stats.nvrtc import KernelCompileError, find_nvrtc

logger = logging.getLogger(__name__)

LIBRARY = "libcuda.so.1"
"""The driver's name for the linker."""
MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: above 48 KiB a kernel must ask for it."""
DEFAULT_SHARED_BYTES = 48 << 10


class CudaError(GradsDistError):
    """The CUDA driver refused a call."""


class Driver:
    """libcuda. Raises OSError where there is none."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(LIBRARY)

    def call(self, function: str, *arguments: object) -> None:
        """Call a driver function; raises CudaError with the driver's name for what went wrong."""
        status = getattr(self._lib, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._lib.cuGetErrorName(status, ctypes.byref(name))
            raise CudaError(f"kernels: {function}: {(name.value or str(status).encode()).decode()}")


class DeviceLauncher:
    """Launches kernels on one device. Kernel files are compiled and loaded when first used.

    `tile` is that of the outer products by mma.sync, by default the one for the device. Where one is named
    those are used on Hopper, too.
    """

    def __init__(self, device: torch.device, tile: Tile | None = None) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.num_multiprocessors: int = properties.multi_processor_count
        self.tile = tile or tile_for(properties.shared_memory_per_multiprocessor)
        self._capability = (properties.major, properties.minor)
        self._may_use_sm90a = tile is None and self._capability == (9, 0)
        self._driver = Driver()
        self._context = ctypes.c_void_p()
        number = ctypes.c_int()
        self._driver.call("cuInit", 0)
        self._driver.call("cuDeviceGet", ctypes.byref(number), device.index)
        # The context that torch uses; kept for the life of the process, as torch keeps it.
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)
        self._modules: dict[str, ctypes.c_void_p] = {}
        self._functions: dict[tuple[str, int], ctypes.c_void_p] = {}

    @functools.cached_property
    def hopper(self) -> HopperTile | None:
        """The tile of the outer products for sm_90a; None where they do not run or cannot be compiled."""
        if not self._may_use_sm90a:
            return None
        try:
            with self._in_context():
                self._module(OUTER_SM90)
        except KernelCompileError as error:
            logger.warning("%s; outer_product.cu is used instead", error)
            return None
        return HopperTile()

    def tensor_map(self, x_NC: Tensor, box_rows: int) -> bytes:
        """What the copy engine needs to know of a matrix (cuda_tensor_map.encode_tensor_map)."""
        return encode_tensor_map(
            lambda *arguments: self._driver.call("cuTensorMapEncodeTiled", *arguments), x_NC, box_rows
        )

    def launch(
        self,
        file: str,
        kernel: str,
        params: ctypes.Structure,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
    ) -> None:
        """Queue a kernel of `file` on torch's current stream; returns at once."""
        # A thread of autograd's may have no current context yet.
        with self._in_context():
            function = self._function(file, kernel, shared_bytes)
            stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
            self._driver.call(
                "cuLaunchKernel", function, *grid, 1, threads, 1, 1, shared_bytes, stream, arguments, None
            )

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _function(self, file: str, kernel: str, shared_bytes: int) -> ctypes.c_void_p:
        key = (kernel, shared_bytes)
        if key not in self._functions:
            function = ctypes.c_void_p()
            self._driver.call(
                "cuModuleGetFunction", ctypes.byref(function), self._module(file), kernel.encode()
            )
            if shared_bytes > DEFAULT_SHARED_BYTES:
                self._driver.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared_bytes)
            self._functions[key] = function
        return self._functions[key]

    def _module(self, file: str) -> ctypes.c_void_p:
        if file not in self._modules:
            tile = HopperTile() if file == OUTER_SM90 else self.tile
            image = find_image(file, self._capability, tile)
            module = ctypes.c_void_p()
            self._driver.call("cuModuleLoadData", ctypes.byref(module), image)
            self._modules[file] = module
        return self._modules[file]


@functools.cache
def launcher_for(device: torch.device) -> DeviceLauncher:
    """The launcher of a device with an index; one a process."""
    return DeviceLauncher(device)


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, in a few words; None where they can."""
    if device.type != "cuda":
        return f"{device.type} is no CUDA device"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    if find_nvrtc() is None and not PREBUILT.is_dir():
        return "no libnvrtc in NVIDIA's wheels, CUDA_HOME or the linker's path"
    try:
        Driver()
    except OSError:
        return f"no {LIBRARY}"
    return None
