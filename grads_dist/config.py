"""The whole configuration: composed of what each stage declares beside its code, saved and loaded as YAML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from grads_dist.data.config import DataConfig
from grads_dist.errors import ConfigError
from grads_dist.model.config import ModelConfig
from grads_dist.parsing import build, make_parser, parse
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.rundir import atomic_write
from grads_dist.runtime.trackers import TrackerName
from grads_dist.selection.config import SelectionConfig
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.yaml_text import dump_yaml


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The causal language model whose gradients are read."""

    data: DataConfig
    """The corpus, its format and how it is tokenized."""

    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The preliminary epoch and what is read from it."""

    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    """Nearest neighbours in feature space."""

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """The score, the budget and what is picked."""

    deepspeed: str | None = None
    """Path of a DeepSpeed JSON file, "auto" values are filled in; ZeRO-2 if unset."""

    output_dir: str = "run"
    """The run directory."""

    report_to: list[TrackerName] = field(default_factory=list)
    """Trackers that rank 0 reports to beside the files in logs/: wandb, tensorboard, trackio."""

    def __post_init__(self) -> None:
        _check_path("output_dir", self.output_dir)
        if self.deepspeed is not None:
            _check_path("deepspeed", self.deepspeed)


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Everything that a selection from a table of the user's depends on, beside the table."""

    data: DataConfig | None = None
    """The corpus that the table is about, for the subset."""

    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    """Nearest neighbours in feature space."""

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """The score, the budget and what is picked."""

    output_dir: str = "run"
    """Where the selection goes."""

    def __post_init__(self) -> None:
        _check_path("output_dir", self.output_dir)


def _check_path(name: str, value: str) -> None:
    if not value.strip() or "\0" in value:
        raise ConfigError(f"{name}: {value!r} is not allowed; allowed: a path")


def save_config(config: Config, path: Path) -> None:
    """Write `config` with every default filled in; `load_config` gives an equal one back."""
    content = asdict(config)
    # YAML knows no tuples.
    content["selection"]["band"] = list(config.selection.band)
    with atomic_write(path) as temporary:
        temporary.write_text(dump_yaml(content), encoding="utf-8")


def load_config(path: Path) -> Config:
    """Read a configuration file; raises ConfigError with one line for anything that is wrong with it."""
    parser = make_parser("grads-dist", Config, "")
    return build(parser, parse(parser, ["--config", str(path)], Config), Config)
