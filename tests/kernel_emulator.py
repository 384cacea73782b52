"""Runs the CUDA kernels' source on a CPU (kernels/emulator), behind the interface of a device."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from grads_dist.stats.cuda_images import OUTER_SM90, AnyTile, macros_of
from grads_dist.stats.cuda_tensor_map import encode_tensor_map
from grads_dist.stats.cuda_tile import HopperTile, Tile

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
FLAGS = ("-x", "c++", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC")
# Without these, two builds of one kernel in one process would share functions and static arrays.
PRIVATE = ("-fno-gnu-unique", "-Wl,-Bsymbolic")
FAULTS = {1: "deadlock", 2: "misaligned access", 3: "outside shared memory", 4: "no operand of wgmma"}
SMALL = Tile(rows=64, cols=64, depth=32, stages=3, warps_m=2, warps_n=2)
"""Many tiles in small matrices, and few threads to emulate."""
SMALL_HOPPER = HopperTile(cols=128, stages=2, total_cols=64, total_stages=3, depth=32)
"""The same, and samples of many slices; two boxes of columns, as there is a distance between them."""


def missing() -> str | None:
    """Why nothing can be emulated here; None where it can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "the emulator switches fibers in x86-64 assembly"
    return None if shutil.which("g++") else "no g++"


def build(file: str, tile: AnyTile, folder: Path, edit: Callable[[str], str] | None = None) -> Path:
    """Compile a file of kernels/cuda for the emulator, after `edit` has changed all of its text."""
    sources = KERNELS / "cuda"
    if edit is not None:
        sources = folder / "cuda"
        shutil.rmtree(sources, ignore_errors=True)
        shutil.copytree(KERNELS / "cuda", sources)
        for path in sources.glob("*.cu*"):
            path.write_text(edit(path.read_text()))
    library = folder / f"{Path(file).stem}.so"
    macros = [f"-D{name}={value}" for name, value in macros_of(file, tile).items()]
    # A broken copy runs once: compiling it takes longer.
    command = ["g++", "-O1" if edit is None else "-O0", *FLAGS, *PRIVATE, "-DGD_EMULATOR", *macros]
    command += [f"-I{KERNELS / 'emulator'}", str(sources / file), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class EmulatedLauncher:
    """Runs kernels one after another; fails where they deadlock, misalign or read banks twice at once.

    With a tile for `hopper` the outer products are those for sm_90a.
    """

    num_multiprocessors = 2

    def __init__(self, folder: Path, tile: Tile = SMALL, hopper: HopperTile | None = None) -> None:
        self.tile, self.hopper, self.seed = tile, hopper, 1
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}

    def with_kernels(self, file: str, library: Path) -> EmulatedLauncher:
        """The same launcher, with the kernels of `file` from a library built elsewhere."""
        other = EmulatedLauncher(self._folder, self.tile, self.hopper)
        other._libraries = self._libraries | {file: ctypes.CDLL(str(library))}
        return other

    def with_hopper(self, tile: HopperTile) -> EmulatedLauncher:
        """The same launcher and libraries, with the outer products for sm_90a."""
        other = EmulatedLauncher(self._folder, self.tile, tile)
        other._libraries = self._libraries
        return other

    def launch(
        self,
        file: str,
        kernel: str,
        params: ctypes.Structure,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
    ) -> None:
        """Run one kernel to its end."""
        library = self._library(file)
        function = ctypes.cast(getattr(library, kernel), ctypes.c_void_p)
        run = library.gd_emulate
        run.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_uint] * 2,
            *[ctypes.c_int] * 2,
            ctypes.c_uint,
        ]
        fault = run(function, ctypes.addressof(params), *grid, threads, shared_bytes, self.seed)
        assert fault == 0, f"{kernel}: {FAULTS[fault]}"
        assert library.gd_bank_conflicts() == 0, f"{kernel}: bank conflicts in ldmatrix"

    def tensor_map(self, x_NC: Tensor, box_rows: int) -> bytes:
        """As the emulated copy engine takes it."""

        def call(*arguments: object) -> None:
            assert self._library(OUTER_SM90).gd_encode_tensor_map(*arguments) == 0, "no such tensor map"

        return encode_tensor_map(call, x_NC, box_rows)

    def _library(self, file: str) -> ctypes.CDLL:
        if file not in self._libraries:
            tile = self.hopper if file == OUTER_SM90 else self.tile
            self._libraries[file] = ctypes.CDLL(str(build(file, tile, self._folder)))
        return self._libraries[file]


def passes(check: Callable[[], None], seconds: int = 30) -> bool:
    """Whether `check` passes, tried in a child process: a broken kernel may write anywhere, or never end."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        torch.set_num_threads(1)  # the parent's are not in the child, which would wait for them
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
