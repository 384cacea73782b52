"""The CUDA kernels' machine code: built with the package, or from the cache, or compiled at first use.

Imports neither torch nor anything else that is not in the standard library: setup.py uses it too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grads_dist.stats import nvrtc
from grads_dist.stats.cuda_tile import HopperTile, Tile

logger = logging.getLogger(__name__)

OUTER, OUTER_SM90 = "outer_product.cu", "outer_product_sm90.cu"
FILES = (OUTER, OUTER_SM90, "statistics.cu", "rows.cu", "head.cu")
"""What is compiled, each to an image of its own."""
PREBUILT = Path(__file__).parent.parent / "_cubins"
"""Where an installation that was built with nvcc has its images."""
AnyTile = Tile | HopperTile
TILES: dict[str, tuple[AnyTile, ...]] = {OUTER: (Tile(), Tile(stages=3)), OUTER_SM90: (HopperTile(),)}
"""The tiles that devices get (cuda_tile.tile_for); only the outer products have any."""


def macros_of(file: str, tile: AnyTile) -> dict[str, int]:
    """What a file is compiled with."""
    return tile.macros() if file in TILES else {}


def compiled_for(file: str, architecture: str) -> str | None:
    """What a file is compiled for to run on `architecture` (sm_80, compute_90, ...); None where it does not.

    Only a file for sm_90a differs: no other device runs its instructions, not even a newer one.
    """
    if file != OUTER_SM90:
        return architecture
    return "sm_90a" if architecture in ("sm_90", "sm_90a") else None


def image_name(file: str, architecture: str, tile: AnyTile, compiler: str) -> str:
    """Holds all that an image depends on, so that none with the right name is ever out of date."""
    options = nvrtc.compile_options(architecture, macros_of(file, tile))
    parts = (repr(sorted(nvrtc.source_texts().items())), file, repr(options), compiler)
    key = hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
    return f"{Path(file).stem}-{architecture}-{key}.bin"


def find_image(file: str, capability: tuple[int, int], tile: AnyTile) -> bytes:
    """The image of a file for a device. Raises KernelCompileError where none can be had."""
    for minor in range(capability[1], -1, -1):
        target = compiled_for(file, f"sm_{10 * capability[0] + minor}")
        if target and (path := PREBUILT / image_name(file, target, tile, "nvcc")).is_file():
            return path.read_bytes()
    compiler = nvrtc.find_nvrtc()
    if compiler is None:
        raise nvrtc.KernelCompileError(f"kernels: no NVRTC found to compile {file} with")
    target = compiled_for(file, nvrtc.architecture_for(capability, compiler.architectures))
    if target is None:
        raise nvrtc.KernelCompileError(f"kernels: {compiler.path} does not compile {file}")
    return cached_image(compiler, file, target, tile)


def cached_image(compiler: nvrtc.Nvrtc, file: str, architecture: str, tile: AnyTile) -> bytes:
    """The image from the cache, or compiled and put there."""
    path = cache_folder() / image_name(file, architecture, tile, f"nvrtc {compiler.version}")
    if path.is_file():
        return path.read_bytes()
    image = compiler.compile(file, architecture, macros_of(file, tile)).image
    logger.info("kernels: compiled %s for %s with %s", file, architecture, compiler.path)
    try:
        _publish(path, image)
    except OSError as error:
        logger.warning("kernels: %s cannot be written (%s); compiled again next time", path, error.strerror)
    return image


def cache_folder() -> Path:
    """`kernels` in GRADS_DIST_CACHE, else in ~/.cache/grads_dist."""
    return Path(os.environ.get("GRADS_DIST_CACHE") or "~/.cache/grads_dist").expanduser() / "kernels"


def build_images(folder: Path, architectures: Sequence[str], files: Sequence[str] = FILES) -> list[Path]:
    """Compile with nvcc for architectures such as sm_90, into a `folder` that becomes PREBUILT.

    Raises KernelCompileError with what nvcc said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    built = []
    for architecture in architectures:
        for file in files:
            target = compiled_for(file, architecture)
            if target is None:
                continue
            for tile in TILES.get(file, (Tile(),)):
                path = folder / image_name(file, target, tile, "nvcc")
                _run_nvcc(file, target, tile, path)
                built.append(path)
    return built


def _run_nvcc(file: str, architecture: str, tile: AnyTile, path: Path) -> None:
    options = nvrtc.compile_options(architecture, macros_of(file, tile))
    command = ["nvcc", "--cubin", *options, "-o", str(path), str(nvrtc.SOURCES / file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise nvrtc.KernelCompileError(f"kernels: nvcc cannot be run: {error.strerror}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
        raise nvrtc.KernelCompileError(
            f"kernels: nvcc could not compile {file} for {architecture}: {errors[0]}"
        )


def _publish(path: Path, image: bytes) -> None:
    """Write under a name of its own, then rename: several ranks compile the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="tmp-", delete=False) as file:
        try:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
