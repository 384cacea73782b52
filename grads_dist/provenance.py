"""What a run directory says of how it came about."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_dist.config import Config
from grads_dist.identity import SCHEMA

if TYPE_CHECKING:
    from grads_dist.data.store import TokenStore

PACKAGES = (
    "grads-dist",
    "torch",
    "deepspeed",
    "transformers",
    "numpy",
    "pyarrow",
    "faiss-cpu",
    "faiss-gpu",
)


def origin(config: Config, fingerprint: str) -> dict[str, Any]:
    """Schema, corpus and configuration of a run, for its manifest."""
    text = json.dumps(asdict(config), sort_keys=True)
    return {
        "schema": SCHEMA,
        "corpus": fingerprint,
        "config": hashlib.sha256(text.encode()).hexdigest(),
    }


def target_set(fingerprint: str, store: TokenStore) -> dict[str, Any]:
    """Which rows the features of the target set are of."""
    return {"corpus": fingerprint, "rows": store.num_rows, "rejected": store.num_rejected}


def environment(world_size: int, device: str, launcher: str) -> dict[str, Any]:
    """Versions, device, ranks and launcher of this run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
        "world_size": world_size,
        "launcher": launcher,
        "versions": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    folder, name = str(Path(__file__).parent), Path(__file__).name

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An environment inside some other checkout is not tracked there.
        return git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", name) else None
    except FileNotFoundError:
        return None
