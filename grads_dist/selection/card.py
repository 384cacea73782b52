"""The dataset card of a subset: README.md with the YAML header that `datasets` and the hub read.

Names come from outside and may hold anything: in the header they pass through a YAML writer, and in the text
they stand in code spans that they cannot close.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.exported import Exported
from grads_dist.selection.loading import loading
from grads_dist.selection.origin import Origin

_EXTRA_TYPES = {"grads_score": "float64", "grads_rank": "int64"}
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")
_MOST_NAMES = 5


@dataclass(frozen=True)
class Facts:
    """What a card is about."""

    exported: Exported
    summary: Mapping[str, Any]
    """What summary.json holds."""

    origin: Origin
    fingerprint: str
    """Of the corpus."""

    reasons: Mapping[str, str]
    """Trainer (LLaMA-Factory, axolotl) -> why it cannot read the rows, where it cannot."""


def card(facts: Facts) -> str:
    """The text of README.md."""
    exported, chosen = facts.exported, facts.origin.selection
    header = yaml.safe_dump(_header(exported, chosen), sort_keys=False, width=float("inf"))
    parts = [
        f"---\n{header}---\n",
        f"# Selection {_code(chosen.name)}\n",
        _opening(facts.summary, chosen.output.scores),
        "## How it was selected\n",
        _items(_rule(chosen, facts.summary)),
        "## Where it comes from\n",
        _items(_origin(facts.origin, facts.fingerprint)),
        "## How to load it\n",
        loading(exported, chosen.name, facts.reasons),
    ]
    return "\n".join(parts)


def _header(exported: Exported, chosen: SelectionConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {"config_name": "default"}
    entry["data_files"] = [{"split": "train", "path": exported.pattern}]
    header: dict[str, Any] = {
        "pretty_name": f"grads_dist selection {chosen.name}",
        "task_categories": ["text-generation"],
        "tags": ["grads-dist", "data-selection", "sft"],
        "size_categories": [_size(exported.num_rows)],
        "configs": [entry],
    }
    if exported.form == "csv":
        # Values of CSV files are text: 007 is no number, and NA is not missing.
        entry["keep_default_na"] = False
        added = _EXTRA_TYPES if chosen.output.scores else {}
        features = [{"name": name, "dtype": added.get(name, "string")} for name in exported.columns]
        header["dataset_info"] = {"config_name": "default", "features": features}
    return header


def _size(num_rows: int) -> str:
    """The hub's name of a size."""
    power = max(len(str(num_rows)) - 3, 0)
    if power == 0:
        return f"n<{_SIZES[0]}"
    return f"{_SIZES[power - 1]}<n<{_SIZES[power]}" if power < len(_SIZES) else f"n>{_SIZES[-1]}"


def _opening(summary: Mapping[str, Any], has_scores: bool) -> str:
    counts = summary["counts"]
    added = (
        "have the columns `grads_score` and `grads_rank` (1 is best) behind their own"
        if has_scores
        else "are as they were"
    )
    return (
        f"{counts['selected']} of the {counts['scored']} rows of a fine-tuning corpus that were scored,\n"
        "selected by grads_dist from per-sample gradients, after GrADS (arXiv 2511.08620). They are in the\n"
        f"order of the corpus and {added}.\n"
        "Row k of `selected.parquet` tells index, id, score and rank of row k, and `summary.json` all\n"
        "else about the selection.\n"
    )


def _rule(chosen: SelectionConfig, summary: Mapping[str, Any]) -> list[str]:
    budget, weights = summary["budget"], chosen.weights
    lines = [f"criterion {_code(chosen.criterion)}, picked by {_code(chosen.pick)}, seed {chosen.seed}"]
    if chosen.criterion == "grads":
        signal = chosen.signal if isinstance(chosen.signal, str) else ", ".join(chosen.signal)
        adjusted = ", without what answer length explains" if chosen.length_adjust else ""
        lines.append(f"signal {_code(signal)}{adjusted}; gradient criterion {_code(chosen.gradient)}")
        lines.append(
            f"score: {weights.g:g} G + {weights.d:g} D - {weights.r:g} R (gradient criterion, content "
            "diversity, similarity reduction)"
        )
    limit = "none" if budget["unit"] == "none" else f"{budget['limit']} {budget['unit']}"
    lines.append(f"budget: {limit}")
    if chosen.dedup_threshold is not None:
        lines.append(f"no two rows with a cosine of {chosen.dedup_threshold:g} or more")
    if chosen.stratify_by is not None:
        lines.append(f"the values of {_code(chosen.stratify_by)} keep their shares")
    counts = {name: value for name, value in summary["counts"].items() if value is not None}
    lines.append("rows: " + ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()))
    return lines


def _origin(origin: Origin, fingerprint: str) -> list[str]:
    lines = []
    model, probe, manifest = origin.model, origin.probe, origin.manifest
    if model is not None and model.name_or_path:
        adapter = f" with adapter {_code(_name(model.adapter))}" if model.adapter else ""
        lines.append(f"model {_code(_name(model.name_or_path))}{_revision(model.revision)}{adapter}")
    if probe is not None:
        lines.append(f"probe: mode {_code(probe.mode)}, seed {probe.seed}")
    if "targets" in manifest:
        lines.append("targets: " + _names(list(manifest["targets"])))
    corpus = [_name(pattern) for pattern in origin.data.patterns]
    lines.append(f"corpus {_names(corpus)}{_revision(origin.data.revision)}")
    lines.append(f"fingerprint of the corpus (sha256): `{fingerprint}`")
    if "config" in manifest:
        lines.append(f"hash of the probe's configuration (sha256): {_code(str(manifest['config']))}")
    return [*lines, f"grads_dist {_version()}"]


def _version() -> str:
    try:
        return metadata.version("grads-dist")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _revision(revision: str | None) -> str:
    return f" at revision {_code(revision)}" if revision else ""


def _name(path: str) -> str:
    """A hub name as it is; of a path the last part, since folders are about a machine."""
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
    return Path(path).name if is_path else path


def _names(names: list[str]) -> str:
    shown = ", ".join(map(_code, names[:_MOST_NAMES]))
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def _code(text: str) -> str:
    """A code span that shows `text` on one line, whatever is in it."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text).strip() or " "
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _items(lines: list[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)
