"""The demo: the whole job on a corpus and a model made on the spot, so that nothing has to be downloaded."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.demo.assets import Assets, Stopwatch, build_assets
from grads_dist.demo.report import demo_report
from grads_dist.demo.size import DemoSize
from grads_dist.errors import ConfigError, GradsDistError
from grads_dist.model.config import ModelConfig
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig

logger = logging.getLogger(__name__)

# High beside what a large model is fine-tuned with: a model this small moves little at less.
LEARNING_RATE = 5e-4


def demo(
    output_dir: str = "runs/demo", processes: int = 2, overwrite: bool = True, size: DemoSize | None = None
) -> str:
    """Build a corpus and a model, run the pipeline on them in `processes` ranks, return the text to print.

    Corpus, model and configuration go to `<output_dir>_assets`, the run to `output_dir`; what an earlier demo
    left in both is replaced, unless `overwrite` is off. Raises ConfigError when they cannot be used,
    DataError when too few docstrings are installed, GradsDistError when the run fails.
    """
    size = size or DemoSize()
    run = RunDir(Path(output_dir))
    folder = _assets_folder(run, overwrite)
    run.create(overwrite)
    watch = Stopwatch()
    assets = build_assets(folder, size, watch)
    config_path = folder / "config.yaml"
    save_config(demo_config(assets, run, size), config_path)
    command = run_command(config_path, processes)
    logger.info("%s", shlex.join(command))
    with watch.stage("running the pipeline"):
        outcome = subprocess.run(command, env=_environment(processes), check=False)
    if outcome.returncode != 0:
        raise GradsDistError(f"the demo's run ended with exit code {outcome.returncode}; see {run.logs_dir}")
    return demo_report(run, assets, processes, watch.seconds)


def _assets_folder(run: RunDir, overwrite: bool) -> Path:
    if run.root.name in ("", ".."):
        raise ConfigError(
            f"output_dir: {str(run.root)!r} is not allowed; allowed: a folder with a name, such as runs/demo"
        )
    folder = run.root.with_name(f"{run.root.name}_assets")
    if folder.exists() and not overwrite:
        raise ConfigError(
            f"output_dir: {str(folder)!r}, where the demo's corpus and model go, is there already; "
            "allowed: another folder, or --overwrite to replace it"
        )
    return folder


def demo_config(assets: Assets, run: RunDir, size: DemoSize) -> Config:
    """Return the configuration of the demo's run; what is not set here is the default that any user gets."""
    return Config(
        model=ModelConfig(name_or_path=str(assets.model), dtype="float32"),
        data=DataConfig(path=str(assets.corpus), max_length=size.max_length),
        probe=ProbeConfig(
            mode="train",
            targets=["embedding", "lm_head"],
            global_batch=size.global_batch,
            batch_tokens=size.batch_tokens,
            learning_rate=LEARNING_RATE,
        ),
        selection=SelectionConfig(fraction=0.1),
        output_dir=str(run.root),
    )


def run_command(config_path: Path, processes: int) -> list[str]:
    """Return the command line of the run: the one that a user would type, on a free port of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["-m", "grads_dist", "run", "--config", str(config_path)]
    return [*launch, "--nproc-per-node", str(processes), *program]


def _environment(processes: int) -> dict[str, str]:
    """Share the cores between the ranks, and hide the GPUs where there are fewer of them than ranks."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    num_devices = torch.cuda.device_count()
    if num_devices < processes:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if num_devices:
            logger.info("the demo runs on the CPU: %d GPUs are too few for %d ranks", num_devices, processes)
    return environment
