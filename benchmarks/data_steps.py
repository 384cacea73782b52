"""One step of bench_data.py, in this process: `python data_steps.py JSON` prints what it took.

Imports little by itself, because processes that tokenize import the script that they are started from.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from memory_watch import MemoryWatch, status_mib

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.store import TokenStore
from grads_dist.data.tokenize import tokenize
from grads_dist.data.tokenizer import TokenizerSource

GLOBAL_BATCH, BATCH_TOKENS, SHARD_ROWS, WORLD_SIZE = 64, 8192, 4096, 8


def measure_open(folder: Path, files: str, processes: int) -> list[dict]:
    """Open the corpus without a cache, then with it."""
    results = []
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        for step in ("open", "reopen"):
            with MemoryWatch() as watch:
                start = time.perf_counter()
                Corpus.open(DataConfig(str(folder / files), cache_dir=cache))
                seconds = time.perf_counter() - start
            results.append({"step": step, "seconds": seconds, "cpu_seconds": watch.cpu_seconds})
    return results


def measure_tokenize(folder: Path, files: str, processes: int) -> list[dict]:
    """Rows to store; the store of one file is kept for the steps after this one."""
    import transformers  # noqa: F401  -- as a run has by now; the processes that it starts have not

    cache = folder / "cache" / files
    shutil.rmtree(cache, ignore_errors=True)
    config = DataConfig(str(folder / files), cache_dir=str(cache), num_workers=processes)
    corpus = Corpus.open(config)
    with MemoryWatch() as watch:
        start = time.perf_counter()
        store = tokenize(config, corpus, TokenizerSource(str(folder / "tokenizer")))
        seconds = time.perf_counter() - start
    if files == "1 jsonl":
        # In one process or two, the store is the same.
        (folder / "store.txt").write_text(str(store.path))
    return [
        {
            "seconds": seconds,
            "cpu_seconds": watch.cpu_seconds,
            "num_tokens": store.meta["num_tokens"],
            "disk_bytes": sum(path.stat().st_size for path in store.path.iterdir()),
            "anon_peak_mib": watch.peak_mib,
            "child_peak_mib": watch.children_mib,
        }
    ]


def measure_map(folder: Path, files: str, processes: int) -> list[dict]:
    """The same tokens and masks by `datasets`. Raises AssertionError where they differ from the store's."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    store = TokenStore.open(Path((folder / "store.txt").read_text()))
    path = str(folder / files / "000000.jsonl")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        with MemoryWatch() as load:
            start = time.perf_counter()
            rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
            loaded = time.perf_counter()
        with MemoryWatch() as watch:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

            def encode(batch: dict) -> dict:
                found = tokenizer.apply_chat_template(
                    batch["messages"], return_dict=True, return_assistant_tokens_mask=True
                )
                return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

            num_proc = processes if processes > 1 else None
            encoded = rows.map(encode, batched=True, num_proc=num_proc, remove_columns=rows.column_names)
            seconds = time.perf_counter() - loaded
        check_equal(store, encoded)
    return [
        {"step": "load_dataset", "seconds": loaded - start, "cpu_seconds": load.cpu_seconds},
        {
            "seconds": seconds,
            "cpu_seconds": watch.cpu_seconds,
            "num_tokens": store.meta["num_tokens"],
            "anon_peak_mib": watch.peak_mib,
            "child_peak_mib": watch.children_mib,
        },
    ]


def check_equal(store: TokenStore, encoded: Sequence[dict]) -> None:
    """Compare a hundred rows, spread over the corpus; a first token never carries loss here."""
    assert len(encoded) == store.num_rows
    for i in np.linspace(0, store.num_rows - 1, 100).astype(int).tolist():
        assert store.tokens(i).tolist() == encoded[i]["input_ids"], f"row {i}: other tokens"
        assert store.loss_mask(i)[1:].tolist() == list(map(bool, encoded[i]["assistant_masks"][1:])), i


def measure_rank(store_folder: Path, mode: str) -> list[dict]:
    """What a rank holds: the store, the plan, one batch at a time."""
    import torch

    from grads_dist.probe.batches import collate
    from grads_dist.probe.plan import frozen_plan, share_units, train_plan

    with MemoryWatch() as watch:
        start = time.perf_counter()
        store = TokenStore.open(store_folder)
        opened = time.perf_counter()
        if mode == "train":
            plan = train_plan(store.num_tokens, GLOBAL_BATCH, BATCH_TOKENS, seed=0)
        else:
            plan = frozen_plan(store.num_tokens, np.arange(store.num_rows), SHARD_ROWS, BATCH_TOKENS)
            share_units(plan, store.num_tokens, WORLD_SIZE)
        planned = time.perf_counter()
    plan_peak, plan_held = watch.peak_mib, watch.grown_mib
    with MemoryWatch() as walk:
        for k in range(len(plan.batch_offsets) - 1):
            rows = plan.batch(k)
            collate(store, rows, np.ones(len(rows)), torch.device("cpu"))
        walked = time.perf_counter()
    file_mib = status_mib("self", "RssFile")
    walked_mib = {"anon_peak_mib": walk.peak_mib, "anon_end_mib": walk.grown_mib, "file_mib": file_mib}
    return [
        {"step": "open store", "seconds": opened - start},
        {
            "step": f"{mode} plan",
            "seconds": planned - opened,
            "cpu_seconds": watch.cpu_seconds,
            "anon_peak_mib": plan_peak,
            "anon_end_mib": plan_held,
        },
        {
            "step": f"{mode} batches",
            "seconds": walked - planned,
            "cpu_seconds": walk.cpu_seconds,
            **walked_mib,
        },
    ]


def measure_train(folder: Path, files: str, processes: int) -> list[dict]:
    """In train mode."""
    return measure_rank(folder, "train")


def measure_frozen(folder: Path, files: str, processes: int) -> list[dict]:
    """In frozen mode."""
    return measure_rank(folder, "frozen")


STEPS: dict[str, Callable[..., list[dict]]] = {
    "open": measure_open,
    "tokenize": measure_tokenize,
    "map": measure_map,
    "train": measure_train,
    "frozen": measure_frozen,
}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(STEPS[asked["step"]](Path(asked["folder"]), asked["files"], asked["processes"])))
