"""Loading a tokenizer, its chat template, and telling whether two are the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_dist.data.reach import cache_alone, unreached
from grads_dist.errors import ConfigError

# What transformers raises for files that are missing, damaged or of another kind.
_LOADING_ERRORS = (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError, RuntimeError)


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from: a folder or hub id, and a revision of it."""

    name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False


def load_tokenizer(source: TokenizerSource) -> Any:
    """The transformers tokenizer of `source`.

    Raises ConfigError when it cannot be loaded or cannot say which characters a token stands for.
    """
    from transformers import AutoTokenizer

    if not source.name_or_path:
        raise ConfigError("model.name_or_path: unset; allowed: a folder or hub id with a tokenizer")
    where = f"model.name_or_path: the tokenizer of {source.name_or_path!r}"
    alone = cache_alone(source.name_or_path, "model.name_or_path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name_or_path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            local_files_only=alone,
        )
    except _LOADING_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        if "custom code" in reason:
            raise ConfigError(
                f"{where} brings Python code of its own, which is not run; allowed: model.trust_remote_code: "
                "true, for a model that you trust"
            ) from error
        if alone:
            raise ConfigError(
                f"{where} is out of reach: {unreached()}, and its cache does not hold all of it"
            ) from error
        raise ConfigError(f"{where} cannot be loaded ({type(error).__name__}: {reason})") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{where} gives no character offsets; allowed: one with a tokenizer.json")
    return tokenizer


def find_template(tokenizer: Any, path: str | None) -> str | None:
    """The chat template: the text of the file `path`, else the tokenizer's own, None if it has none.

    Raises ConfigError when the file cannot be read, or the tokenizer has several templates and no default.
    """
    if path is not None:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template: {path!r} cannot be read ({error})") from error
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            "data.chat_template: the tokenizer has several chat templates and no default; give one as a file"
        ) from error


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of everything that decides the tokens: the backend's full state and the special tokens."""
    facts = [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), sorted(special_ids(tokenizer))]
    facts += [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens, turn markers included."""
    marked = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))
