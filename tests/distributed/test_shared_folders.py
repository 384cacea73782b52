"""Folders that are another one on each node. As a script, this file is a rank on a node of its own."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from grads_dist.runtime import shared

OWN = "/proc/self/cwd/own"
"""A path that means another folder for every rank, which each have a working directory of their own."""
SOON = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from workspace import make_model, make_rows, write_jsonl

    folder = tmp_path_factory.mktemp("shared")
    make_model(folder / "model")
    write_jsonl(folder / "corpus.jsonl", make_rows(20))
    return folder


@pytest.mark.parametrize(
    ("option", "path"), [("output_dir", f"'{OWN}'"), ("data.cache_dir", rf"'{OWN}/tokens/\w+/meta\.json'")]
)
def test_a_folder_that_is_not_shared_is_refused_before_any_model_is_loaded(
    bare_ranks, folder, tmp_path, option, path
):
    from workspace import run_arguments

    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    args = run_arguments(folder, option, **{option: OWN, "probe.mode": "frozen"})
    results = bare_ranks(2, [sys.executable, __file__, str(tmp_path), "probe", *args])
    errors = "".join(err for _, _, err in results)
    assert [code for code, _, _ in results] == [2, 2], errors
    (line,) = [line for line in errors.splitlines() if line.startswith("grads-dist: error:")]
    host = socket.gethostname()
    told, _, rest = line.removeprefix("grads-dist: error: ").partition(" has written to ")
    assert told == f"{option}: rank 1 (host {host}) does not see what rank 0 (host {host})"
    seen, _, allowed = rest.partition("; allowed: ")
    assert re.fullmatch(path, seen), line
    assert allowed == "a folder on a file system that all nodes share"
    assert "Loading weights" not in errors
    # Nor has the rank that sees nothing made anything of its own.
    assert list((tmp_path / "node1").iterdir()) == []


def test_a_folder_that_is_seen_late_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "LOOK", 0.05)
    file = tmp_path / "tokens" / "a1" / "meta.json"

    def appear() -> None:
        time.sleep(0.3)
        file.parent.mkdir(parents=True)
        file.write_text("{}")

    thread = threading.Thread(target=appear)
    thread.start()
    truth = hashlib.sha256(b"{}").hexdigest()
    assert shared._sees(file, shared._hash, truth, time.monotonic() + 10)
    thread.join()
    # Another of its name is not the same.
    file.write_text("[]")
    assert not shared._sees(file, shared._hash, truth, time.monotonic() + 0.2)


def _main(folder: str, *args: str) -> int:
    from grads_dist import cli

    os.chdir(Path(folder) / f"node{os.environ['RANK']}")
    shared.SEEN_WITHIN = SOON
    return cli.main(args)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
