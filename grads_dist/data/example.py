"""What a row is once its format is read: the same few shapes for all formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Chat:
    """A conversation, as a chat template takes it."""

    messages: list[dict[str, Any]]
    num_prompt: int = 0
    """How many messages are the prompt of a completion."""
    tools: list[dict[str, Any]] | None = None
    """The functions that may be called, for the template to show."""


@dataclass(frozen=True)
class Completion:
    """Text and how it goes on; what comes after the prompt carries loss."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text that carries loss throughout."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids int64[T] and bool[T], whether each carries loss."""

    input_ids: np.ndarray
    loss: np.ndarray


Example = Chat | Completion | Text | Tokens
