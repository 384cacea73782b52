"""Everything static is in pyproject.toml; the CPU kernels are built from here where there is a C++ compiler.

Neither torch nor nvcc is needed. Without a compiler the package installs all the same and computes in torch.
With GRADS_DIST_BUILD_CUDA=1 nvcc compiles the CUDA kernels ahead of their first use.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = os.path.join("kernels", "cpu")
HEADERS = ("api.h", "common.h", "panels.h", "row_sums.h", "segment_stats.h", "tiles.h")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
CUDA_ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
# Only for tests; with -O3 or -g it takes four times as long to split their vectors.
WIDE = ["-mavx2", "-mfma", "-O2", "-g0"]
PAIRS, TILES = "-DGD_BF16_PAIRS", "-DGD_BF16_TILES"
# Name, floats in a register, rows of the register tile, flags: one build of variant.cpp each.
GENERIC = [("generic", 4, 6, [])]
X86 = [
    ("avx2", 8, 6, ["-mavx2", "-mfma"]),
    ("avx512", 16, 12, ["-mavx512f"]),
    ("wide", 16, 12, WIDE),
    ("widebf16", 16, 12, [*WIDE, PAIRS]),
    ("wideamx", 16, 32, [*WIDE, TILES]),
]
# Each with a macro for dispatch.cpp; what a compiler does not know is left out, with all that follows.
X86_IF_KNOWN = [
    (("avx512bf16", 16, 12, ["-mavx512bf16", PAIRS]), "GD_AVX512BF16"),
    (("amx", 16, 32, ["-mavx512bf16", "-mamx-tile", "-mamx-bf16", TILES]), "GD_AMX"),
]


class BuildKernels(build_ext):
    """Compiles one source once for each instruction set and links them to one library with a C interface."""

    def run(self):
        """Build the CPU kernels, and the CUDA kernels if asked for."""
        super().run()
        if os.environ.get("GRADS_DIST_BUILD_CUDA") == "1":
            sys.path.insert(0, os.getcwd())
            from grads_dist.stats.cuda_images import build_images

            package = Path("grads_dist") if self.inplace else Path(self.build_lib, "grads_dist")
            build_images(package / "_cubins", CUDA_ARCHITECTURES)

    def build_extension(self, ext):
        """Build the library; setuptools goes on without it when this fails, because it is optional."""
        on_x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects = []
        for variant in GENERIC + (X86 if on_x86 else []):
            objects += self._compile_variant(*variant)
        objects += self._compile_x86_dispatch() if on_x86 else self._compile("dispatch.cpp", "dispatch")
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.compiler.link_shared_object(objects, path, extra_postargs=["-fopenmp"], target_lang="c++")

    def get_export_symbols(self, ext):
        """A C interface: there is no module initialisation to export."""
        return []

    def _compile_x86_dispatch(self):
        objects, macros = [], [("GD_X86", "1")]
        for variant, macro in X86_IF_KNOWN:
            try:
                found = self._compile_variant(*variant)
                self._compile("dispatch.cpp", "dispatch", [*macros, (macro, "1")])
            except CompileError:
                self.warn(f"the compiler does not know {variant[0]}: the CPU kernels are built without it")
                break
            objects += found
            macros.append((macro, "1"))
        return objects + self._compile("dispatch.cpp", "dispatch", macros)

    def _compile_variant(self, name, lanes, rows, flags):
        macros = [("GD_VARIANT", name), ("GD_LANES", str(lanes)), ("GD_ROWS", str(rows))]
        return self._compile("variant.cpp", name, macros, flags)

    def _compile(self, source, name, macros=(), flags=()):
        return self.compiler.compile(
            [os.path.join(SOURCES, source)],
            output_dir=os.path.join(self.build_temp, name),
            macros=list(macros),
            depends=[os.path.join(SOURCES, header) for header in HEADERS],
            extra_postargs=[*FLAGS, *flags],
        )


setup(
    ext_modules=[Extension("grads_dist._cpu_kernels", [os.path.join(SOURCES, "variant.cpp")], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
