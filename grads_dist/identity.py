"""What decides the numbers of a probe: written when a run starts, compared when it is started again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grads_dist.config import Config
from grads_dist.errors import GradsDistError

if TYPE_CHECKING:
    from grads_dist.data.store import TokenStore

SCHEMA = 2
"""Version of the run directory's layout."""

Identity = dict[str, Any]

_FREE = {
    "model": ("name_or_path", "adapter", "revision", "gradient_checkpointing"),
    "data": ("path", "target", "chat_template", "num_workers", "cache_dir"),
    "probe": ("batch_tokens", "head_chunk_mib", "checkpoint_steps", "checkpoints", "checkpoint_weights"),
}
"""Fields that may differ between two starts of one run: what they name is compared by content, or they change
how the work is done and nothing of its outcome beyond rounding."""

_FREE_FROZEN = ("global_batch", "learning_rate", "max_grad_norm", "objective", "epochs", "save_model")
"""Fields of the probe that do nothing in frozen mode."""

UNKNOWN = "unknown"
"""A value that is not compared."""

CLEARING = "clearing"
"""In an identity while what an earlier run has left is removed: shards of both would be mixed up."""
JOB = "job"
"""The batch job that started the run."""
LAUNCH = "launch"
"""The agents of torchrun that started it, if any (`Start.launch`)."""

_SHOWN = 3
_LONGEST = 60


@dataclass(frozen=True)
class Share:
    """The part of a corpus that one run of several probes: the `number`-th of `count`, from 1."""

    number: int
    count: int

    def rows(self, num_rows: int) -> range:
        """Which rows of the corpus those are: as many as of the other shares, give or take one."""
        return range(num_rows * (self.number - 1) // self.count, num_rows * self.number // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def hash_tokens(index: np.ndarray, num_tokens: np.ndarray, token_hash: np.ndarray) -> str:
    """sha256 over which rows are used, their lengths, and hashes of their tokens."""
    digest = hashlib.sha256()
    for array, kind in ((index, "<i8"), (num_tokens, "<i4"), (token_hash, "<i8")):
        digest.update(np.ascontiguousarray(array, dtype=kind).data)
    return digest.hexdigest()


def identify(
    config: Config,
    corpora: dict[str, tuple[str, TokenStore]],
    deepspeed: dict[str, Any],
    share: Share | None,
    num_rows: int,
    dtype: str,
) -> Identity:
    """Everything that the numbers of a probe depend on.

    Args:
        config: the configuration as it holds.
        corpora: "data.path", and "data.target" if there is one: fingerprint and tokens of each.
        deepspeed: content of the DeepSpeed file.
        share: the share of the corpus that is probed; None for all.
        num_rows: rows of the whole corpus.
        dtype: type of the weights, which `model.dtype` may leave to the device.
    """
    frozen = config.probe.mode == "frozen"
    free = {**_FREE, "probe": _FREE["probe"] + (_FREE_FROZEN if frozen else ())}
    sections = {name: values for name, values in asdict(config).items() if name in free}
    return {
        "schema": SCHEMA,
        "config": {
            name: {key: value for key, value in values.items() if key not in free[name]}
            for name, values in sections.items()
        },
        "dtype": dtype,
        "models": _models(config),
        # Where nothing is trained, it is about memory and time.
        "deepspeed": {} if frozen else deepspeed,
        "corpora": {name: fingerprint for name, (fingerprint, _) in corpora.items()},
        "tokens": {
            name: hash_tokens(store.index, store.num_tokens, store.token_hash)
            for name, (_, store) in corpora.items()
        },
        "rows": num_rows,
        "usable_rows": corpora["data.path"][1].num_rows,
        "share": None if share is None else str(share),
    }


def read_identity(path: Path) -> Identity:
    """What an earlier start wrote. Raises GradsDistError when it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GradsDistError(f"{path}: cannot be read ({error}); --overwrite starts anew") from None
    if not isinstance(content, dict):
        raise GradsDistError(f"{path}: is no record of a run; --overwrite starts anew")
    return content


def differences(before: Identity, now: Identity) -> str | None:
    """What changed from one start of a run to another, in words; None where nothing did."""
    now = json.loads(json.dumps(now))
    for key in (CLEARING, JOB, LAUNCH):
        before, now = ({k: v for k, v in identity.items() if k != key} for identity in (before, now))
    told = [_tell(key, was, new) for key, was, new in _changes(before, now, "")]
    told = list(dict.fromkeys(told))
    if not told:
        return None
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return ", ".join(told[:_SHOWN]) + more


def _models(config: Config) -> dict[str, str]:
    """Fingerprints of the model, its adapter and the probed checkpoints, by the fields that name them."""
    from grads_dist.model.fingerprint import fingerprint
    from grads_dist.model.load import load_config

    model = config.model
    commit = getattr(load_config(model), "_commit_hash", None)
    found = {"model.name_or_path": fingerprint(str(model.name_or_path), model.revision, commit)}
    if model.adapter is not None:
        found["model.adapter"] = fingerprint(model.adapter, None, None)
    for number, name in enumerate(config.probe.checkpoints):
        found[f"probe.checkpoints[{number}]"] = fingerprint(name, None, None)
    return found


def _changes(before: Any, now: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(dict.fromkeys([*before, *now]))
        parts = [_changes(before.get(n), now.get(n), f"{key}.{n}" if key else n) for n in names]
        return [change for part in parts for change in part]
    # What joined shares cannot say is not compared.
    return [(key, before, now)] if before not in (now, UNKNOWN) else []


def _tell(key: str, was: Any, new: Any) -> str:
    section, _, rest = key.partition(".")
    if section == "config":
        return f"{rest} was {_short(was)} and is {_short(new)}"
    if section == "models":
        return f"{rest} names another model"
    if section == "corpora":
        return f"{rest} names another corpus"
    if section == "tokens":
        return f"the tokens of {rest} differ (tokenizer, template, or their libraries)"
    if section == "deepspeed":
        return f"{rest} in the DeepSpeed file was {_short(was)} and is {_short(new)}"
    if section == "dtype":
        return f"the type of the weights was {was} and is {new}"
    if section == "share":
        return f"--shard was {was or 'not given'} and is {new or 'not given'}"
    return f"{key} was {_short(was)} and is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
