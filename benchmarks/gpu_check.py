"""Everything that needs an NVIDIA GPU, in one command of at most nine minutes on a fresh machine.

    python benchmarks/gpu_check.py                  compile, compare with float64, sanitizers, timings, steps
    python benchmarks/gpu_check.py --only checks    the comparisons alone

Timings of the kernels go to results/gpu_check_<device>.csv, those of whole training steps at 1B parameters
to what bench_step.py writes. Needs torch with CUDA and numpy; neither nvcc nor pytest nor an installed
package. Training also needs transformers, the steps deepspeed too; they are left out without. Without a GPU
that the kernels run on it says so in one line and ends with code 2; with a failed check, with code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gpu_timing  # noqa: E402  -- the package and the tests need not be installed
import head_checks  # noqa: E402
import kernel_checks as checks  # noqa: E402
from report import commit, format_table, write_csv  # noqa: E402

from grads_dist.stats import cuda_driver, cuda_launch, nvrtc  # noqa: E402
from grads_dist.stats.cuda_images import FILES, OUTER_SM90, compiled_for, macros_of  # noqa: E402
from grads_dist.stats.cuda_tile import HopperTile  # noqa: E402

PHASES = ("compile", "checks", "sanitizers", "timings", "steps")
SECONDS = 540.0
"""For everything; timings that would begin later are left out, and said to be."""
SANITIZER_SECONDS = 100.0
STEP_SECONDS = 150.0
"""What the timings of the kernels leave of that for the steps."""
STEP_OPTIONS = ("--shape", "1b", "--lengths", "128,512,2048", "--repeats", "6", "--profile")
SMALL, LARGE = (checks.EDGES, [0, 0, 3], [1] * 40), ([33, 0, 65, 5, 409], [2048])


def main() -> int:
    """Run the phases asked for; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=(*PHASES, "small"), help="one phase")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    reason = cuda_driver.unavailable_reason(device)
    if reason:
        print(f"gpu_check: nothing was run: {reason}")
        return 2
    deadline = time.monotonic() + SECONDS
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    phases = PHASES if args.only is None else (args.only,)
    failed = 0
    if "compile" in phases:
        failed += run_all(compile_cases(device))
    if "checks" in phases or "small" in phases:
        failed += run_all(check_cases("cuda:0", large="checks" in phases))
    if "checks" in phases:
        failed += run_all(head_cases("cuda:0"))
        failed += run_all(training_cases("cuda:0"))
    if "sanitizers" in phases:
        failed += sum(not sanitize(tool) for tool in ("memcheck", "racecheck"))
    if "timings" in phases:
        end = deadline - STEP_SECONDS * ("steps" in phases)
        rows = [row | provenance(device) for row in gpu_timing.measure(device, end)]
        print(format_table(gpu_timing.TABLE, rows))
        name = re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).strip("_").lower()
        write_csv(args.out / f"gpu_check_{name}.csv", (*gpu_timing.COLUMNS, *provenance(device)), rows)
    if "steps" in phases:
        failed += not time_steps(deadline, args.out)
    print(f"gpu_check: {failed} failed" if failed else "gpu_check: all passed")
    return 1 if failed else 0


Case = tuple[str, Callable[[], object]]


def run_all(cases: Iterator[Case]) -> int:
    """Run the cases with poisoned memory, saying how each went; how many failed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    failed = 0
    for name, case in cases:
        try:
            case()
            torch.cuda.synchronize()
            print(f"ok    {name}", flush=True)
        except (AssertionError, RuntimeError, cuda_driver.GradsDistError):
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc(limit=-2)}", flush=True)
    torch.use_deterministic_algorithms(False)
    return failed


def compile_cases(device: torch.device) -> Iterator[Case]:
    """Every file for this device, without what an earlier run left in the cache."""
    compiler = nvrtc.find_nvrtc()
    if compiler is None:
        print("skip  compile: no libnvrtc, the images were built with the package")
        return
    architecture = nvrtc.architecture_for(torch.cuda.get_device_capability(device), compiler.architectures)

    def compile_file(file: str, target: str) -> None:
        tile = HopperTile() if file == OUTER_SM90 else cuda_driver.launcher_for(device).tile
        log = compiler.compile(file, target, macros_of(file, tile)).log
        bad = [
            line
            for line in log.splitlines()
            if ("spill" in line and " 0 bytes spill stores" not in line) or "Performance Loss" in line
        ]
        assert not bad, bad

    for file in FILES:
        if target := compiled_for(file, architecture):
            yield f"compile {file} for {target}", lambda f=file, t=target: compile_file(f, t)


def check_cases(device: str, large: bool) -> Iterator[Case]:
    """The comparisons of the tests on the device, and the same on matrices of many tiles."""
    types = (torch.bfloat16, torch.float16)
    shapes = [(shape, lengths) for shape in ((70, 101), (1, 1), (300, 123)) for lengths in SMALL]
    if large:
        shapes += [(shape, lengths) for shape in ((1000, 1096), (2048, 1024)) for lengths in LARGE]
    for kernel, using in outer_kernels(device):
        for check in (checks.check_outer, checks.check_total):
            for shape, lengths in shapes:
                for dtype in types:
                    yield (
                        f"{check.__name__} {kernel} {shape} {dtype} {lengths}",
                        using(lambda c=check, s=shape, t=dtype, n=lengths: c(device, s, t, n)),
                    )
        for name in "against_reference nonfinite scales neighbours masks".split():
            check = getattr(checks, f"check_outer_{name}")
            yield f"outer_{name} {kernel}", using(lambda check=check: check(device))
    yield "no operation waits for the device", lambda: check_no_waiting(device)
    for name in ("vector_nonfinite", "row_sums", "repeats"):
        yield name, lambda name=name: getattr(checks, f"check_{name}")(device)
    for dtype in (*types, torch.float32):
        yield f"vectors {dtype}", lambda t=dtype: checks.check_vectors(device, 133, t)
        yield f"embedding {dtype}", lambda t=dtype: checks.check_embedding(device, 520, t)
    for pair in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        yield f"softmax {pair}", lambda pair=pair: checks.check_softmax(device, 5003, *pair)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"column bounds {dtype}", lambda t=dtype: checks.check_column_bounds(device, 533, t)
    if large:
        yield "repeats, many tiles", lambda: checks.check_repeats(device, (2048, 1096), (512, 33, 0, 1000))


def outer_kernels(device: str) -> Iterator[tuple[str, Callable[[gpu_timing.Run], gpu_timing.Run]]]:
    """The kernels of outer products that run there, each with what makes a check use it."""
    launcher = cuda_launch.launcher_for(torch.device(device))
    if launcher.hopper is not None:
        yield "sm_90a", lambda run: run
        launcher = gpu_timing.mma_launcher(torch.device(device))
    yield "mma.sync", lambda run: gpu_timing.with_launcher(launcher, run)


def head_cases(device: str) -> Iterator[Case]:
    """The whole pass over the LM head with the kernels, against the same pass in torch on the CPU."""
    for name in head_checks.CASES:
        yield f"head, {name}", lambda name=name: head_checks.check_head(device, name)
    yield "head, nonfinite", lambda: head_checks.check_head_nonfinite(device)
    yield "head, waits", lambda: head_checks.check_head_waits(device)


def training_cases(device: str) -> Iterator[Case]:
    """Fifty steps with the weight gradients from the kernels' products, against plain training."""
    if find_spec("transformers") is None:
        print("skip  training: no transformers")
        return
    from training_checks import check_training

    yield "training, 50 steps", lambda: check_training(device, 50)


def check_no_waiting(device: str) -> None:
    """Every operation queues its work and returns."""
    run = checks.all_kernels(device)
    run()  # compiles and loads, which does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sanitize(tool: str) -> bool:
    """Run the small comparisons under compute-sanitizer; true when it finds nothing or is not there."""
    path = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if path is None:
        print(f"skip  {tool}: no compute-sanitizer")
        return True
    # Without the caching allocator every tensor is an allocation of its own, with bounds to check.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--only", "small"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"skip  {tool}: not done after {SANITIZER_SECONDS:.0f} s")
        return True
    print(f"{'ok   ' if done.returncode == 0 else 'FAIL '} {tool}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:])
    return done.returncode == 0


def time_steps(deadline: float, out: Path) -> bool:
    """Run bench_step.py in a process of its own, as far as the time goes; false when it failed."""
    absent = [name for name in ("transformers", "deepspeed", "accelerate") if find_spec(name) is None]
    left = deadline - time.monotonic()
    if absent or left < STEP_SECONDS / 2:
        print(f"skip  steps: {'no ' + absent[0] if absent else f'{max(0, left):.0f} s are left'}")
        return True
    # A length that is begun takes some seconds.
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_step.py"), *STEP_OPTIONS]
    command += ["--seconds", f"{left - STEP_SECONDS / 3:.0f}", "--out", str(out)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    torch.cuda.empty_cache()
    try:
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        print(f"skip  steps: not done after {left:.0f} s")
        return True
    print(done.stdout, flush=True)
    print(f"{'ok   ' if done.returncode == 0 else 'FAIL '} steps", flush=True)
    if done.returncode:
        print(done.stderr[-4000:])
    return done.returncode == 0


def provenance(device: torch.device) -> dict[str, object]:
    """Hardware, versions and commit."""
    compiler = nvrtc.find_nvrtc()
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(map(str, compiler.version)) if compiler else None,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
