"""From `data.path` to files: names, globs, folders, and datasets that `datasets` wrote or fetches."""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grads_dist.data.config import DataConfig
from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import MARKER

logger = logging.getLogger(__name__)

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What ends like a file is one, even if it is not there: nobody means a dataset of the hub by it.
_FILE_SUFFIXES = {
    *KINDS,
    ".txt",
    ".tsv",
    ".ndjson",
    ".gz",
    ".zst",
    ".xz",
    ".bz2",
    ".zip",
    ".xlsx",
    ".pkl",
    ".pt",
}
# Beside the data of a dataset, about it.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SAVED_DICT, _SAVED = "dataset_dict.json", "state.json"


@dataclass(frozen=True)
class Source:
    """A file of the corpus and how it is read."""

    path: Path
    kind: Kind


def locate(config: DataConfig) -> list[Source]:
    """The files of `config.path`, in the order of the list and sorted within a glob or folder.

    What this program wrote below a folder or glob, runs and the cache, is left out. What exists under a name
    is taken before a dataset of the hub. Raises ConfigError for a name without a file, a file of an unknown
    kind, one named twice, and a split that fits nothing; DataError for a dataset folder that cannot be read.
    """
    sources: list[Source] = []
    for pattern in config.patterns:
        sources += _sources(pattern, config)
    seen: set[Path] = set()
    for source in sources:
        if source.path.resolve() in seen:
            raise ConfigError(f"data.path: {str(source.path)!r} is named twice")
        seen.add(source.path.resolve())
    _check_dataset_options(config)
    return sources


def names_dataset(pattern: str) -> bool:
    """Whether `split`, `name` and `revision` can be about this entry of a path: a folder or hub dataset."""
    return Path(pattern).expanduser().is_dir() or is_hub_id(pattern)


def is_hub_id(pattern: str) -> bool:
    """Whether an entry of a path names a dataset of the hub (org/name): nothing local has this name."""
    if not _HUB_ID.fullmatch(pattern) or Path(pattern).suffix.lower() in _FILE_SUFFIXES:
        return False
    return not Path(pattern).exists()


def reads_all_of(folder: Path, config: DataConfig) -> bool:
    """Whether a folder, if `config.path` names it, stands for all its files; else it is a dataset."""
    described = (folder / _SAVED_DICT).is_file() or (folder / _SAVED).is_file()
    return folder.is_dir() and not described and config.split is None and config.name is None


def absolute(pattern: str) -> str:
    """The entry of a path with its folder; the name of a dataset of the hub stays as it is."""
    # Not resolved: a link that the user named stays the name.
    return pattern if is_hub_id(pattern) else str(Path(pattern).expanduser().absolute())


def _sources(pattern: str, config: DataConfig) -> Iterator[Source]:
    # A file whose own name looks like a glob is that file.
    plain = Path(pattern).expanduser()
    try:
        names = [str(plain)] if plain.exists() else sorted(glob.glob(str(plain), recursive=True))
    except OSError as error:
        raise ConfigError(f"data.path: {pattern!r} cannot be looked up ({error.strerror})") from error
    if not plain.exists():
        names = _without_own(names, plain, config)
    if not names:
        if not is_hub_id(pattern):
            raise ConfigError(f"data.path: {pattern!r} matches no file")
        yield from _fetched(pattern, config)
    for path in map(Path, names):
        if path.is_dir():
            yield from _of_folder(path, config)
        else:
            yield _source(path)


def _source(path: Path) -> Source:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"data.path: {str(path)!r} does not end in {', '.join(KINDS)}")
    if path.exists() and not path.is_file():
        # A pipe or a device would be read for ever, or not twice.
        raise ConfigError(f"data.path: {str(path)!r} is no file that can be read twice")
    return Source(path, kind)


def _of_folder(folder: Path, config: DataConfig) -> Iterator[Source]:
    if reads_all_of(folder, config):
        yield from _loose(folder, config)
    elif (folder / _SAVED_DICT).is_file():
        yield from _saved(_split_folder(folder, config.split))
    elif (folder / _SAVED).is_file():
        if config.split is not None:
            raise ConfigError(f"data.split: {config.split!r} is given, but {str(folder)!r} has no splits")
        yield from _saved(folder)
    else:
        yield from _fetched(str(folder), config)


def _without_own(names: list[str], pattern: Path, config: DataConfig) -> list[str]:
    """The matches of a glob but those inside a run or the cache, unless the glob names something in there."""
    parts = pattern.parts
    base = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    cache = config.cache_folder().resolve()
    matched = [(path, [path, *path.parents][: len(path.parts) - base]) for path in map(Path, names)]
    own = {
        folder
        for folder in {folder for _, folders in matched for folder in folders}
        if (folder / MARKER).is_file() or (folder.is_dir() and folder.resolve() == cache)
    }
    kept = []
    for path, folders in matched:
        depth = max((i for i, folder in enumerate(folders) if folder in own), default=None)
        if depth is None or not all(map(glob.has_magic, parts[max(base, len(parts) - depth) :])):
            kept.append(str(path))
    if own:
        logger.info("%s: not read: %s", pattern, ", ".join(sorted(f"{folder}/" for folder in own)))
    return kept


def _loose(folder: Path, config: DataConfig) -> list[Source]:
    """All files of a known kind, with those of its folders, but for run directories and the cache.

    Folders that are links are not entered.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    own = _own_below(folder, paths, config)
    paths = [path for path in paths if own.isdisjoint(path.parents)]
    paths = [path for path in paths if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    used = [path for path in paths if path.suffix.lower() in KINDS and path.name not in _ABOUT]
    used = [path for path in used if not path.is_dir()]
    for path in used:
        if not path.is_file():
            # Passed over, its rows would be missed by nobody.
            raise ConfigError(f"data.path: {str(path)!r} is no file, or a link to none")
    if not used:
        raise ConfigError(f"data.path: no file in {str(folder)!r} ends in {', '.join(KINDS)}")
    passed = [f"{path.relative_to(folder)}/" for path in sorted(own)]
    passed += [str(path.relative_to(folder)) for path in sorted({*paths} - {*used})]
    logger.info("%d files in %s%s", len(used), folder, f"; not read: {', '.join(passed)}" if passed else "")
    return [_source(path) for path in used]


def _own_below(folder: Path, paths: list[Path], config: DataConfig) -> set[Path]:
    """What this program wrote below a folder, `paths` being all its files: run directories, and the cache."""
    own = {path.parent for path in paths if path.name == MARKER}
    cache, root = config.cache_folder().resolve(), folder.resolve()
    if cache.is_dir() and cache.is_relative_to(root):
        own.add(folder / cache.relative_to(root))
    return own - {folder}


def _split_folder(folder: Path, split: str | None) -> Path:
    splits = _read_json(folder / _SAVED_DICT).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise DataError(f"data.path: {str(folder / _SAVED_DICT)!r} names no splits")
    if split is None and len(splits) > 1:
        raise ConfigError(f"data.split: unset, but {str(folder)!r} has several; allowed: {', '.join(splits)}")
    if split is not None and split not in splits:
        raise ConfigError(
            f"data.split: {split!r} is no split of {str(folder)!r}; allowed: {', '.join(splits)}"
        )
    chosen = str(split or splits[0])
    if not _is_plain(chosen):
        raise DataError(f"data.path: {str(folder / _SAVED_DICT)!r} names a split outside of it, {chosen!r}")
    return folder / chosen


def _saved(folder: Path) -> list[Source]:
    """The Arrow files of a dataset as `save_to_disk` leaves it."""
    state = _read_json(folder / _SAVED)
    if state.get("_indices_data_files"):
        raise DataError(
            f"data.path: {str(folder)!r} keeps its rows' order apart; save it again with datasets 2 or later"
        )
    files = state.get("_data_files")
    paths = []
    for file in files if isinstance(files, list) else []:
        name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(name, str) or not _is_plain(name) or not (folder / name).is_file():
            raise DataError(f"data.path: {str(folder)!r} lacks its file {name!r}")
        paths.append(folder / name)
    if not paths:
        raise DataError(f"data.path: {str(folder / _SAVED)!r} names no files")
    return [Source(path, "arrow") for path in paths]


def _is_plain(name: str) -> bool:
    """Whether a description of a dataset names something in its own folder by this."""
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & {*name}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"data.path: {str(path)!r} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"data.path: {str(path)!r} is no description of a dataset")
    return content


def _fetched(name: str, config: DataConfig) -> list[Source]:
    from grads_dist.data.hub import fetch

    return [Source(path, "arrow") for path in fetch(name, config)]


def _check_dataset_options(config: DataConfig) -> None:
    for option in ("split", "name", "revision"):
        value = getattr(config, option)
        if value is not None and not any(map(names_dataset, config.patterns)):
            raise ConfigError(
                f"data.{option}: {value!r} is given, but data.path names no dataset; allowed: with org/name "
                "or the folder of a dataset"
            )
