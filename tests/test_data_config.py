"""The `data` section: what is refused, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grads_dist.data.config import DataConfig
from grads_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "data.path: '' is not a file, a glob or a non-empty list of them"),
        ({"path": []}, "data.path: [] is not a file, a glob or a non-empty list of them"),
        (
            {"format": "csv"},
            "data.format: 'csv' is not one of auto, messages, sharegpt, alpaca, prompt_completion, text, "
            "tokens",
        ),
        ({"columns": {"chat": "x"}}, "data.columns: 'chat' is not one of messages, conversations, prompt"),
        ({"columns": {"id": 3}}, "data.columns.id: 3 is not a column name"),
        ({"max_length": 1}, "data.max_length: 1 is not a whole number of at least 2"),
        ({"max_length": True}, "data.max_length: True is not a whole number"),
        ({"limit": 0}, "data.limit: 0 is not a whole number of at least 1"),
        ({"num_workers": 0}, "data.num_workers: 0 is not a whole number of at least 1"),
        ({"assistant_only_loss": "no"}, "data.assistant_only_loss: 'no' is not true or false"),
        ({"completion_only_loss": 1}, "data.completion_only_loss: 1 is not true, false or null"),
        (
            {"roles": {"bot": "robot"}},
            "data.roles.bot: 'robot' is not one of system, user, assistant, tool",
        ),
        ({"roles": "bot"}, "data.roles: 'bot' is not a map from a role tag to a role"),
        ({"split": ""}, "data.split: '' is not a name"),
        ({"target": []}, "data.target: [] is not a file, a glob or a non-empty list of them"),
        ({"chat_template": " "}, "data.chat_template: ' ' is not a path"),
    ],
)
def test_bad_values_name_field_value_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        DataConfig(**{"path": "a.jsonl", **values})
    assert str(failure.value).startswith(message)


def test_cache_folder_prefers_the_field_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADS_DIST_CACHE", "/somewhere")
    assert DataConfig("a.jsonl").cache_folder() == Path("/somewhere")
    assert DataConfig("a.jsonl", cache_dir="/here").cache_folder() == Path("/here")
    monkeypatch.delenv("GRADS_DIST_CACHE")
    assert DataConfig("a.jsonl").cache_folder() == Path.home() / ".cache" / "grads_dist"
