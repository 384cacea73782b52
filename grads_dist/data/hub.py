"""Datasets of the hub, or of a folder laid out like one, through the `datasets` library, as Arrow files.

The library keeps what it loads as Arrow files in its own cache; they are read where they lie. Only a part of
them, as `train[:10%]` gives, is copied.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from grads_dist.data.cache import publish
from grads_dist.data.config import DataConfig
from grads_dist.data.reach import is_reached, unreached
from grads_dist.errors import ConfigError

logger = logging.getLogger(__name__)

_BATCH_ROWS = 1024
# What the library, and the readers under it, raise for files that are missing, damaged or of another kind.
_LOADING_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, EOFError, pa.ArrowException,
    yaml.YAMLError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pickle.UnpicklingError,
)  # fmt: skip


def fetch(name: str, config: DataConfig) -> list[Path]:
    """The Arrow files of the dataset `name` (org/name, or a folder), by its configured name, split, revision.

    Raises ConfigError when it cannot be loaded, as one that would have to run code of its own, or has several
    splits and none is chosen.
    """
    dataset = _load(name, config)
    if hasattr(dataset, "keys"):
        splits = list(dataset.keys())
        if len(splits) > 1:
            raise ConfigError(f"data.split: unset, but {name!r} has several; allowed: {', '.join(splits)}")
        dataset = dataset[splits[0]]
    logger.info("%s has %d rows (%s)", name, len(dataset), dataset.split or "one split")
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if files and _num_rows(files) == len(dataset):
        return files
    return _copied(dataset, config.cache_folder())


def _load(name: str, config: DataConfig) -> Any:
    import datasets

    options: dict[str, Any] = {}
    if int(datasets.__version__.partition(".")[0]) < 4:
        # From version 4 on no dataset can bring code, and the option is gone.
        options["trust_remote_code"] = False
    try:
        with _cache_alone(name):
            return datasets.load_dataset(
                name, name=config.name, split=config.split, revision=config.revision, **options
            )
    except _LOADING_ERRORS as error:
        raise _refusal(name, error) from error
    except datasets.exceptions.DatasetsError as error:
        raise _refusal(name, error) from error


@contextmanager
def _cache_alone(name: str) -> Iterator[None]:
    """Let the library look into its cache at once for a dataset of a hub that does not answer."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not (Path(name).is_dir() or is_reached())
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _refusal(name: str, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    here = "" if Path(name).is_dir() else "is no file or folder, and "
    if here and isinstance(error, OSError) and not is_reached():
        reason = f"{unreached()}, and the cache does not hold it"
    return ConfigError(f"data.path: {name!r} {here}cannot be loaded as a dataset ({reason})")


def _num_rows(files: list[Path]) -> int:
    from grads_dist.data.tables import TableFile

    return sum(TableFile(path).num_rows for path in files)


def _copied(dataset: Any, cache_folder: Path) -> list[Path]:
    """The rows as files in the cache, under a name of their content."""
    folder = cache_folder / "datasets" / _content_hash(dataset)
    if not folder.exists():
        with publish(folder) as temporary:
            dataset.save_to_disk(temporary)
    return sorted(folder.glob("*.arrow"))


def _content_hash(dataset: Any) -> str:
    digest = hashlib.sha256(dataset.features.arrow_schema.to_string().encode())
    for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:32]
