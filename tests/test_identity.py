"""What two starts of one run may differ in, and what they may not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grads_dist.errors import GradsDistError
from grads_dist.identity import UNKNOWN, Share, differences, hash_tokens, read_identity
from grads_dist.model.fingerprint import fingerprint, folder_fingerprint

BASE = {
    "schema": 2,
    "dtype": "float32",
    "config": {
        "probe": {"learning_rate": 1e-5, "targets": ["embedding"], "seed": 0},
        "data": {"max_length": 48},
    },
    "models": {"model.name_or_path": "a"},
    "corpora": {"data.path": "b"},
    "tokens": {"data.path": "c"},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "share": None,
}


def changed(*path: str, to: object) -> dict:
    copy = json.loads(json.dumps(BASE))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return copy


def test_nothing_changed():
    assert differences(BASE, json.loads(json.dumps(BASE))) is None


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (changed("config", "probe", "seed", to=1), "probe.seed was 0 and is 1"),
        (
            changed("config", "probe", "targets", to=["lm_head"]),
            'probe.targets was ["embedding"] and is ["lm_head"]',
        ),
        (changed("models", "model.name_or_path", to="x"), "model.name_or_path names another model"),
        (changed("corpora", "data.path", to="x"), "data.path names another corpus"),
        (
            changed("tokens", "data.path", to="x"),
            "the tokens of data.path differ (tokenizer, template, or their libraries)",
        ),
        (
            changed("deepspeed", "zero_optimization", "stage", to=3),
            "zero_optimization.stage in the DeepSpeed file was 2 and is 3",
        ),
        (
            changed("deepspeed", "bf16", to={"enabled": True}),
            'bf16 in the DeepSpeed file was null and is {"enabled',
        ),
        (changed("share", to="1/2"), "--shard was not given and is 1/2"),
        (changed("schema", to=3), "schema was 2 and is 3"),
        (changed("dtype", to="bfloat16"), "the type of the weights was float32 and is bfloat16"),
    ],
)
def test_a_change_is_told(now, told):
    assert (differences(BASE, now) or "").startswith(told)


def test_what_shares_cannot_say_is_not_compared():
    before = changed("tokens", "data.path", to=UNKNOWN)
    assert differences(before, BASE) is None


def test_how_it_was_started_is_not_compared():
    started = {"job": "slurm job 1", "launch": "a1", "clearing": True}
    assert differences({**BASE, **started}, {**BASE, "job": None}) is None


def test_many_changes_are_counted():
    now = changed("config", "probe", to={})
    now["schema"] = 7
    assert (differences(BASE, now) or "").endswith("and 1 more")


def test_a_record_that_cannot_be_read(tmp_path):
    (tmp_path / "a").write_text("{")
    (tmp_path / "b").write_text("[]")
    for name in ("a", "b", "c"):
        with pytest.raises(GradsDistError, match="--overwrite starts anew"):
            read_identity(tmp_path / name)


@pytest.mark.parametrize(("num_rows", "count"), [(10, 3), (3, 3), (100, 7), (2, 5)])
def test_shares_are_the_corpus_once_and_equal(num_rows, count):
    shares = [Share(n, count).rows(num_rows) for n in range(1, count + 1)]
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_tokens_hash_does_not_depend_on_the_type_of_the_arrays():
    index, hashes = np.arange(4), np.arange(4) * -7
    one = hash_tokens(index, np.array([3, 4, 5, 6], np.int32), hashes)
    assert one == hash_tokens(index, np.array([3, 4, 5, 6], np.int64), hashes)
    assert one != hash_tokens(index, np.array([3, 4, 5, 7], np.int32), hashes)


def write_model(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_model_is_known_by_its_content(tmp_path):
    weights = np.random.default_rng(0).bytes(9 << 20)
    one = write_model(tmp_path / "one", weights)
    assert folder_fingerprint(one) == folder_fingerprint(write_model(tmp_path / "moved", weights))
    trained = (np.frombuffer(weights, np.uint8) ^ 1).tobytes()
    assert folder_fingerprint(one) != folder_fingerprint(write_model(tmp_path / "trained", trained))
    assert folder_fingerprint(one) != folder_fingerprint(write_model(tmp_path / "longer", weights + b"x"))
    (one / "config.json").write_text('{"a": 1}')
    assert folder_fingerprint(one) != folder_fingerprint(tmp_path / "moved")


def test_a_model_of_the_hub_is_known_by_its_commit():
    assert fingerprint("org/name", None, "abc") == fingerprint("org/name", "main", "abc") == "org/name@abc"
    assert fingerprint("org/name", None, None) == "org/name@main"
