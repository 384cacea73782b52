"""Corpus to token store: every row used or rejected once, whatever the number of processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import (
    CHATML,
    GENERATION,
    REVERSED,
    build,
    chat,
    make_spaced_tokenizer,
    make_tokenizer,
    write_jsonl,
)
from transformers import AutoTokenizer

from grads_dist.data import tokenize as tokenize_module
from grads_dist.data.encode import token_hash
from grads_dist.data.layout import Counts
from grads_dist.data.store import TokenStore
from grads_dist.errors import ConfigError, DataError, GradsDistError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("bos"), template=None, bos=True)


def decoded(store: TokenStore, model: Path) -> list[tuple[str, str]]:
    """For each row its text and the text that carries loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = ((store.tokens(i), store.loss_mask(i)) for i in range(store.num_rows))
    return [(tokenizer.decode(ids.tolist()), tokenizer.decode(ids[loss].tolist())) for ids, loss in rows]


def assert_whole(store: TokenStore, num_corpus_rows: int, max_length: int = 2048) -> None:
    """Each row of the corpus is in the store once or rejected once, and the store's own promises hold."""
    rejected = [index for index, _ in store.iter_rejected()]
    assert sorted([*store.index.tolist(), *rejected]) == list(range(num_corpus_rows))
    assert len(rejected) == store.num_rejected
    assert np.all(np.diff(store.index) > 0)
    for i in range(store.num_rows):
        ids, loss = store.tokens(i), store.loss_mask(i)
        assert ids.dtype == np.int32 and loss.dtype == np.bool_ and len(ids) == len(loss)
        assert not loss[0] and loss.sum() == store.num_label_tokens[i] >= 1
        assert len(ids) == store.num_tokens[i] >= 2 and ids.max() < store.vocab_size
        is_cut = len(ids) == max_length
        assert is_cut or store.token_hash[i] == token_hash(ids, loss)


BAD_ROWS: list[tuple[Any, str | None]] = [
    (chat("hello", "the fox"), None),
    ('{"messages": [', "broken JSON (a.jsonl, line at byte "),
    ({"prompt": "a"}, "no column 'messages'; the row has: 'prompt'"),
    (
        {"messages": [{"role": "robot", "content": "x"}]},
        "unknown role 'robot' in messages[0]; allowed: system,",
    ),
    ({"messages": [{"role": "user", "content": "x"}]}, "no token carries loss"),
    (chat("🤷🏽‍♀️ \0", "🤷🏽‍♀️ \0 e\u0301 \u200b"), None),
    (chat("a", "x" * 1_000_000), None),
    (chat("x" * 1_000_000, "a"), "no token carries loss within max_length 64 (the row has 1000"),
    (chat("a", ""), None),
    ("7", "the row is a number (7), not an object (a.jsonl, line at byte "),
    (r'{"messages": [{"role": "assistant", "content": "\ud800"}]}', "half a surrogate pair"),
    ("{}", "no column 'messages'; the row has: none"),
]


def test_bad_rows_are_rejected_with_their_reason_and_the_others_go_on(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row for row, _ in BAD_ROWS])
    store = build(tmp_path, path, model, max_length=64)
    assert_whole(store, len(BAD_ROWS), 64)
    reasons = dict(store.iter_rejected())
    for index, (_, reason) in enumerate(BAD_ROWS):
        assert (reason is None) == (index not in reasons), (index, reasons.get(index))
        assert reason is None or reasons[index].startswith(reason), (reason, reasons[index])
    assert "\n" not in "".join(reasons.values())
    assert store.num_truncated == 2 and store.num_tokens.tolist().count(64) == 2
    assert decoded(store, model)[0][1] == "the fox<|im_end|>"
    assert store.ids[:] == [str(index) for index in store.index]


def test_a_row_of_one_token_has_nothing_to_predict(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "hello"}])
    store = build(tmp_path, path, model)
    assert list(store.iter_rejected()) == [(0, "1 token: nothing to predict")]
    assert [text for text, _ in decoded(store, model)] == ["hello</s>"]


@pytest.mark.parametrize("completion_only", [True, False, None])
def test_prompt_and_completion(
    tmp_path: Path, model: Path, bos_model: Path, completion_only: bool | None
) -> None:
    rows = [
        {"prompt": "what is two? ", "completion": "four"},
        {"prompt": "hello", "completion": " world</s>", "id": "é🤷"},
        {"prompt": "the", "completion": ""},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    store = build(tmp_path, path, bos_model, completion_only_loss=completion_only)
    whole = ["<s>what is two? four</s>", "<s>hello world</s>", "<s>the</s>"]
    loss = [text[3:] for text in whole] if completion_only is False else ["four</s>", " world</s>", "</s>"]
    assert decoded(store, bos_model) == list(zip(whole, loss, strict=True))
    assert store.ids[:] == ["0", "é🤷", "2"] and store.ids[-1] == "2" and len(store.ids) == 3
    assert [text for text, _ in decoded(build(tmp_path, path, model), model)] == [text[3:] for text in whole]


def test_prompt_and_completion_as_messages(tmp_path: Path, model: Path) -> None:
    messages = chat("a", "one", "b", "two")["messages"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": messages[:3], "completion": messages[3:]}])
    assert [loss for _, loss in decoded(build(tmp_path, path, model), model)] == ["two<|im_end|>"]


def test_text_has_one_bos_and_one_eos(tmp_path: Path, model: Path, bos_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "hello"}, {"text": "<s>hello</s>"}])
    rows = decoded(build(tmp_path, path, bos_model), bos_model)
    assert rows == [("<s>hello</s>", "hello</s>")] * 2
    store = build(tmp_path, path, model)
    assert [text for text, _ in decoded(store, model)] == ["hello</s>", "<s>hello</s>"]
    assert store.num_label_tokens[0] == store.num_tokens[0] - 1


def test_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
        {"input_ids": [5, 6]},
        {"input_ids": [5]},
        {"input_ids": [5, 6], "labels": [5, -100]},
        {"input_ids": [5, -1]},
        {"input_ids": [5, 6, 99]},
        {"input_ids": [5, 6], "labels": [6, 7]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    store = build(tmp_path, path, tmp_path / "no model", vocab_size=99, max_length=3)
    assert_whole(store, len(rows), 3)
    assert [store.tokens(i).tolist() for i in range(2)] == [[5, 6, 7], [5, 6]]
    assert [store.loss_mask(i).tolist() for i in range(2)] == [[False, True, False], [False, True]]
    assert (store.pad_token_id, store.vocab_size, store.num_truncated) == (0, 99, 1)
    assert [reason for _, reason in store.iter_rejected()] == [
        "1 token: nothing to predict",
        "no token carries loss",
        "token id -1 at position 1 is outside the vocabulary of 99",
        "token id 99 at position 2 is outside the vocabulary of 99",
        "labels[0] is 6 but input_ids[0] is 5; allowed: the token itself or -100 (labels are not shifted)",
    ]
    assert build(tmp_path, path, tmp_path / "no model").vocab_size == 100


def test_hash_is_that_of_the_whole_row_and_what_carries_loss(tmp_path: Path, model: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [5, 6, 7, 9]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100]},
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    first, *others, last = build(tmp_path, path, model, max_length=3).token_hash.tolist()
    # The first token is predicted by nothing, so its label makes no difference.
    assert len({first, *others}) == 3 and last == first
    assert first == token_hash(np.array([5, 6, 7, 8]), np.array([False, True, True, True]))


def test_no_space_is_added_where_a_completion_begins(tmp_path: Path) -> None:
    model = make_spaced_tokenizer(tmp_path / "model")
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hello hello ", "completion": "world"}])
    store = build(tmp_path, path, model)
    assert AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(store.tokens(0)) == [
        "▁hello", "▁hello", "▁world", "</s>",
    ]  # fmt: skip
    assert store.loss_mask(0).tolist() == [False, False, True, True]


def test_what_a_reason_quotes_is_shortened(tmp_path: Path, model: Path) -> None:
    long = "x" * 100_000
    rows: list[Any] = [
        {"messages": [{"role": long, "content": "a"}]},
        {"messages": [{"role": [long], "content": "a"}]},
        {long: 1},
        "1" * 4000,
        chat("a", "b"),
    ]
    store = build(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows), model)
    reasons = [reason for _, reason in store.iter_rejected()]
    assert len(reasons) == 4 and max(map(len, reasons)) < 250
    assert reasons[0].startswith("unknown role 'xxxx") and "x...;" not in reasons[2]
    assert "x... in messages[0]; allowed: system" in reasons[0]


def same_files(first: Path, second: Path) -> None:
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_store_is_the_same_for_one_and_two_processes(tmp_path: Path, model: Path) -> None:
    rows = [{**chat("hello " * (k % 7), "the fox " * (k % 5)), "id": f"row-{k}"} for k in range(57)]
    rows[13] = {"messages": [{"role": "robot", "content": "x"}], "id": "bad"}
    path = write_jsonl(tmp_path / "a.jsonl", list(rows))
    stores = [build(tmp_path / str(n), path, model, num_workers=n) for n in (1, 2)]
    assert_whole(stores[0], 57)
    assert stores[0].ids[13] == "row-14" and stores[0].meta["rejected"] == {"unknown role": 1}
    same_files(stores[0].path, stores[1].path)


def test_tokenizing_goes_on_with_the_pieces_that_are_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**chat("hello " * (k % 7), "the fox " * (k % 5)), "id": f"row-{k}"} for k in range(23)]
    path = write_jsonl(tmp_path / "a.jsonl", list(rows))
    whole = build(tmp_path / "whole", path, model)
    monkeypatch.setattr(tokenize_module, "CHUNK_ROWS", 5)
    encode, encoded = tokenize_module._encode_rows, []

    def failing(encoding, encoder, corpus, rows, folder):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(rows)
        return encode(encoding, encoder, corpus, rows, folder)

    monkeypatch.setattr(tokenize_module, "_encode_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", path, model)
    encoded.append(None)
    store = build(tmp_path / "cut", path, model)
    assert encoded == [range(0, 5), range(5, 10), range(10, 15), None, range(15, 20), range(20, 23)]
    same_files(whole.path, store.path)
    assert [folder.name for folder in store.path.parent.iterdir()] == [store.path.name]


def test_jsonl_and_parquet_give_the_same_tokens(tmp_path: Path, model: Path) -> None:
    rows = [chat("hello", f"fox {k}") for k in range(9)]
    write_jsonl(tmp_path / "a.jsonl", list(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = (build(tmp_path, tmp_path / f"a.{kind}", model) for kind in ("jsonl", "parquet"))
    assert first.path != second.path
    assert first.token_hash.tolist() == second.token_hash.tolist()


def test_buffers_do_not_change_the_store(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("hello", "fox " * k) for k in range(9)])
    whole = build(tmp_path / "1", path, model)
    monkeypatch.setattr("grads_dist.data.layout._FLUSH_ROWS", 2)
    monkeypatch.setattr("grads_dist.data.layout._COPY_ROWS", 4)
    same_files(whole.path, build(tmp_path / "2", path, model).path)


def test_cache_is_hit_only_when_nothing_that_matters_changed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("hello", "the fox"), chat("a", "b")])
    first = build(tmp_path, path, model)
    template = tmp_path / "t.jinja"
    template.write_text(GENERATION)
    others = [
        build(tmp_path, path, model, max_length=24),
        build(tmp_path, path, model, limit=1),
        build(tmp_path, path, model, assistant_only_loss=False),
        build(tmp_path, path, model, chat_template=str(template)),
        build(tmp_path, path, make_tokenizer(tmp_path / "other", template="hello" + CHATML)),
    ]
    assert len({store.path for store in [first, *others]}) == 6
    assert others[1].num_rows == 1
    monkeypatch.setattr(tokenize_module, "_run", lambda *_: pytest.fail("tokenized again"))
    assert build(tmp_path, path, model, num_workers=2, format="messages").path == first.path
    assert [p.name for p in first.path.parent.glob("tmp-*")] == []


def test_what_a_killed_attempt_has_left_is_removed(tmp_path: Path, model: Path) -> None:
    """And nothing of another store, which may be under way."""
    path = write_jsonl(tmp_path / "a.jsonl", [chat("hello", "the fox"), chat("a", "b")])
    store = build(tmp_path, path, model)
    shutil.rmtree(store.path)
    own, other = (store.path.with_name(f"tmp-{name}-0123") for name in (store.path.name, "f" * 32))
    for folder in (own, other):
        folder.mkdir()
        (folder / "tokens.npy").write_bytes(b"torn")
    assert build(tmp_path, path, model).path == store.path
    assert {path.name for path in store.path.parent.iterdir()} == {store.path.name, other.name}


def test_corpus_without_a_usable_row_names_the_most_frequent_reason(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a"), *[chat("a", "b")] * 3])
    template = tmp_path / "t.jinja"
    template.write_text(REVERSED)
    with pytest.raises(DataError) as failure:
        build(tmp_path, path, model, chat_template=str(template))
    assert str(failure.value).startswith(
        "data.path: none of the 4 rows can be used; most often (3 rows), "
        "as in row 1: the turn messages[1] cannot"
    )
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_counts_of_parts_add_up_and_keep_the_first_example() -> None:
    first = Counts(2, 20, 5, 1, 7, Counter({"labels": 1}), {"labels": (3, "a")})
    first.add(
        Counts(1, 10, 2, 0, 9, Counter({"labels": 2, "empty": 1}), {"labels": (8, "b"), "empty": (9, "c")})
    )
    examples = {"labels": (3, "a"), "empty": (9, "c")}
    assert first == Counts(3, 30, 7, 1, 9, Counter({"labels": 3, "empty": 1}), examples)


def test_faults_of_the_configuration(tmp_path: Path, model: Path, bos_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")])
    with pytest.raises(
        ConfigError, match=r"data\.chat_template: the rows are chats and the tokenizer has no"
    ):
        build(tmp_path, path, bos_model)
    with pytest.raises(ConfigError, match=r"model\.name_or_path: no folder '/no/such/model'"):
        build(tmp_path, path, Path("/no/such/model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"model\.name_or_path: the tokenizer of .* cannot be loaded"
    ) as failure:
        build(tmp_path, path, tmp_path / "empty")
    assert "\n" not in str(failure.value)
    with pytest.raises(ConfigError, match=r"data\.chat_template: '.*absent' cannot be read"):
        build(tmp_path, path, model, chat_template=str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no whole token store"):
        TokenStore.open(tmp_path)


def test_error_in_a_process_arrives_as_it_is(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")] * 2)
    template = tmp_path / "t.jinja"
    template.write_text("{% for %}")
    with pytest.raises(ConfigError, match="broken Jinja"):
        build(tmp_path, path, model, chat_template=str(template), num_workers=2)


def test_process_that_dies_is_an_error_and_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}] * 4)
    # os._exit in the worker's place ends it as the kernel does when memory runs out.
    monkeypatch.setattr(tokenize_module, "_start_worker", os._exit)
    with pytest.raises(GradsDistError, match="a tokenization process ended early"):
        build(tmp_path, path, tmp_path, num_workers=2)


def test_choices_and_counts_are_logged(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "hello " * 9), chat("a")])
    with caplog.at_level(logging.INFO, "grads_dist"):
        store = build(tmp_path, path, model, max_length=24)
    assert "rows are messages, loss on assistant turns by growing prefixes" in caplog.text
    label_tokens = int(store.num_label_tokens.sum())
    assert (
        f"1 rows, 24 tokens, {label_tokens} of them carry loss; 1 rows cut at max_length; "
        "1 rows rejected (1 no loss)"
    ) in caplog.text
    assert json.loads((store.path / "meta.json").read_text())["mask"] == "assistant turns by growing prefixes"
