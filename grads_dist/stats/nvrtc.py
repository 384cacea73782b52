"""Compiles the CUDA kernels with NVRTC, which torch's CUDA wheels bring along.

Neither nvcc nor a header of the CUDA toolkit is needed, and no GPU to compile for one.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from grads_dist.errors import GradsDistError

SOURCES = Path(__file__).parent.parent / "_kernels" / "cuda"
"""Where the kernels' sources are, in a checkout and in a wheel."""
OPTIONS = ("--std=c++17", "--ptxas-options=-v")


class KernelCompileError(GradsDistError):
    """NVRTC refused a kernel's source."""


@dataclass(frozen=True)
class Compiled:
    """A kernel file's machine code (or PTX, which the driver turns into it), and what the compiler said."""

    image: bytes
    log: str


class Nvrtc:
    """One libnvrtc. Raises OSError where `path` is no such library."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lib = ctypes.CDLL(path)
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    @functools.cached_property
    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    @functools.cached_property
    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities that it compiles for, as 10 * major + minor, ascending."""
        count = ctypes.c_int()
        self._check("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", found)
        return tuple(sorted(found))

    def compile(self, file: str, architecture: str, macros: Mapping[str, int]) -> Compiled:
        """Compile a file of SOURCES for `architecture` (sm_90, or compute_90 for PTX).

        Raises KernelCompileError with the compiler's first error.
        """
        texts = {name: text.encode() for name, text in source_texts().items()}
        headers = [name for name in texts if name.endswith(".cuh")]
        program = ctypes.c_void_p()
        strings = ctypes.c_char_p * len(headers)
        self._check(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            texts[file],
            file.encode(),
            len(headers),
            strings(*(texts[name] for name in headers)),
            strings(*(name.encode() for name in headers)),
        )
        try:
            options = [option.encode() for option in compile_options(architecture, macros)]
            status = self._lib.nvrtcCompileProgram(
                program, len(options), (ctypes.c_char_p * len(options))(*options)
            )
            log = self._bytes("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if status:
                raise KernelCompileError(self._failure(file, architecture, status, log))
            getter = "nvrtcGetCUBIN" if architecture.startswith("sm_") else "nvrtcGetPTX"
            return Compiled(self._bytes(getter, program), log)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _failure(self, file: str, architecture: str, status: int, log: str) -> str:
        errors = [line for line in log.splitlines() if "error" in line]
        reason = errors[0] if errors else self._lib.nvrtcGetErrorString(status).decode()
        version = ".".join(map(str, self.version))
        return f"kernels: NVRTC {version} could not compile {file} for {architecture}: {reason}"

    def _bytes(self, getter: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"{getter}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getter, program, buffer)
        return buffer.raw

    def _check(self, function: str, *arguments: object) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status:
            raise KernelCompileError(
                f"kernels: {function}: {self._lib.nvrtcGetErrorString(status).decode()} ({self.path})"
            )


@functools.cache
def find_nvrtc() -> Nvrtc | None:
    """The first libnvrtc of `library_paths` that loads; None where there is none."""
    for path in library_paths():
        try:
            return Nvrtc(path)
        except OSError:
            continue
    return None


def library_paths() -> Iterator[str]:
    """Where a libnvrtc may be: NVIDIA's wheels beside torch, CUDA_HOME or CUDA_PATH, the system's linker."""
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels else ():
        yield from _newest_first(Path(folder).glob("*/lib/libnvrtc.so.*"))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            for pattern in ("lib64/libnvrtc.so*", "targets/*/lib/libnvrtc.so*"):
                yield from _newest_first(Path(root).glob(pattern))
    if name := ctypes.util.find_library("nvrtc"):
        yield name


def _newest_first(paths: Iterator[Path]) -> list[str]:
    return sorted(map(str, paths), reverse=True)


def source_texts() -> dict[str, str]:
    """Every file of the CUDA kernels by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cu*"))}


def compile_options(architecture: str, macros: Mapping[str, int]) -> list[str]:
    """The compiler's arguments."""
    defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    return [f"--gpu-architecture={architecture}", *OPTIONS, *defines]


def architecture_for(capability: tuple[int, int], supported: tuple[int, ...]) -> str:
    """What to compile for: machine code of the newest architecture that the device runs, else PTX.

    A device runs machine code of its own major version up to its minor one; PTX of any older architecture.
    """
    device = 10 * capability[0] + capability[1]
    older = [number for number in supported if number <= device]
    if not older:
        raise KernelCompileError(f"kernels: NVRTC compiles for nothing that compute capability {device} runs")
    kind = "sm" if max(older) // 10 == capability[0] else "compute"
    return f"{kind}_{max(older)}"
