"""Corpus to token store: in parallel processes, cached by what decides the tokens."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from grads_dist.data.cache import publish, remove_leftovers
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.detect import resolve_formats
from grads_dist.data.encode import Encoding, RowEncoder
from grads_dist.data.formats import read_id, used_columns
from grads_dist.data.layout import META, ChunkWriter, Counts, join_chunks
from grads_dist.data.locate import Source
from grads_dist.data.rows import Broken, RowError
from grads_dist.data.store import SCHEMA, TokenStore
from grads_dist.data.tokenizer import TokenizerSource, tokenizer_hash
from grads_dist.errors import DataError, GradsDistError

logger = logging.getLogger(__name__)

# A process takes seconds to start, so it must have that many rows to do before another one is worth it.
_ROWS_WORTH_A_PROCESS = 10_000
_CHUNKS_PER_WORKER = 4
CHUNK_ROWS = 20_000
"""Rows that a process encodes in a piece, at most: some ten seconds, which are lost with it."""
_COUNTS = "counts.json"


def tokenize(
    config: DataConfig,
    corpus: Corpus,
    tokenizer_source: TokenizerSource,
    vocab_size: int | None = None,
    rows: range | None = None,
) -> TokenStore:
    """Tokenize the corpus into the cache, or find it there; for one rank, the others open the store's path.

    vocab_size: the model's; rows with a token id beyond it are rejected. rows: which rows of the corpus the
    store is of, all by default. The store does not depend on the number of processes. Raises ConfigError for
    a tokenizer, template or cache that cannot be used, DataError when the columns fit no format or no row can
    be used.

    A large corpus is encoded in pieces that are kept until all are there, so that a later call goes on.
    """
    encoding = Encoding(config, tuple(resolve_formats(config, corpus)), tokenizer_source, vocab_size)
    encoder = RowEncoder(encoding)
    rows = range(corpus.num_rows) if rows is None else rows
    folder = _folder(encoding, encoder, corpus, rows)
    logger.info("rows are %s, loss on %s", encoding.kinds, encoder.mask)
    if (folder / META).exists():
        logger.info("tokens found in the cache: %s", folder)
    else:
        pieces = folder.with_name(f"{folder.name}-pieces")
        try:
            _build(encoding, encoder, corpus, rows, folder, pieces)
        except FileNotFoundError:
            # Another run may have done the same at the same time, and removed the pieces.
            if not (folder / META).exists():
                raise
        except DataError:
            shutil.rmtree(pieces, ignore_errors=True)
            raise
        shutil.rmtree(pieces, ignore_errors=True)
        remove_leftovers(folder)
    store = TokenStore.open(folder)
    _report(store)
    return store


def _build(
    encoding: Encoding, encoder: RowEncoder, corpus: Corpus, rows: range, folder: Path, pieces: Path
) -> None:
    """Make the store `folder`; what is complete of it meanwhile lies in `pieces`."""
    chunks = _plan(encoding.config.num_workers, rows)
    counts = _run(encoding, encoder, corpus, chunks, pieces)
    _check_any(counts, len(rows))
    with publish(folder) as temporary:
        join_chunks([pieces / name for name, _, _ in chunks], temporary)
        meta = _meta(encoding, encoder, corpus, counts)
        (temporary / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def cached(
    config: DataConfig, corpus: Corpus, tokenizer_source: TokenizerSource, vocab_size: int | None = None
) -> TokenStore | None:
    """What `tokenize` would find in the cache; None where it would have to tokenize."""
    encoding = Encoding(config, tuple(resolve_formats(config, corpus)), tokenizer_source, vocab_size)
    folder = _folder(encoding, RowEncoder(encoding), corpus, range(corpus.num_rows))
    return TokenStore.open(folder) if (folder / META).exists() else None


def _folder(encoding: Encoding, encoder: RowEncoder, corpus: Corpus, rows: range) -> Path:
    return encoding.config.cache_folder() / "tokens" / _key(encoding, encoder, corpus, rows)


Chunk = tuple[str, int, int]
"""Name, first row, end."""


def _plan(num_workers: int | None, rows: range) -> list[Chunk]:
    """Contiguous chunks of at most CHUNK_ROWS, and a few a process where there are several."""
    num_workers = worker_count(num_workers, len(rows))
    size = CHUNK_ROWS
    if num_workers > 1:
        size = min(size, -(-len(rows) // (num_workers * _CHUNKS_PER_WORKER)))
    edges = [*range(rows.start, rows.stop, size), rows.stop]
    # The names say which rows, since another number of processes may cut them in other places.
    return [(f"{start:012d}-{stop:012d}", start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def worker_count(num_workers: int | None, num_rows: int) -> int:
    """Processes that tokenize a corpus: `num_workers`, else as many as it is worth and there are cores."""
    if num_workers is not None:
        return min(num_workers, num_rows)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_rows // _ROWS_WORTH_A_PROCESS))


def _run(
    encoding: Encoding, encoder: RowEncoder, corpus: Corpus, chunks: list[Chunk], folder: Path
) -> Counts:
    """Encode the chunks that are not in `folder`; returns the counts of all."""
    missing = [chunk for chunk in chunks if not (folder / chunk[0]).exists()]
    num_rows = sum(stop - start for _, start, stop in missing)
    if len(missing) < len(chunks):
        logger.info("tokens of %d rows are there already", chunks[-1][2] - chunks[0][1] - num_rows)
    num_workers = worker_count(encoding.config.num_workers, max(1, num_rows))
    if num_workers == 1:
        for chunk in missing:
            _encode_chunk(encoding, encoder, corpus, chunk, folder)
    else:
        logger.info("tokenizing %d rows in %d processes", num_rows, num_workers)
        _in_processes((encoding, corpus.sources), missing, folder, num_workers)
    total = Counts()
    for name, _, _ in chunks:
        total.add(Counts.load(folder / name / _COUNTS))
    return total


def _in_processes(
    work: tuple[Encoding, list[Source]], chunks: list[Chunk], folder: Path, num_workers: int
) -> None:
    # Spawned: this process may hold threads, a GPU and process groups, none of which survives a fork.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, work)
    try:
        futures = [pool.submit(_work, chunk, folder) for chunk in chunks]
        for chunk, future in zip(chunks, futures, strict=True):
            future.result()
            logger.info("tokenized the rows up to %d", chunk[2])
    except BrokenProcessPool as error:
        raise GradsDistError(
            "a tokenization process ended early: out of memory, or started from a script without "
            "`if __name__ == '__main__':`; data.num_workers: 1 needs no processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# What a tokenization process works with; set once when it starts, since loading a tokenizer takes seconds.
_worker: tuple[Encoding, RowEncoder, Corpus] | None = None


def _start_worker(encoding: Encoding, sources: list[Source]) -> None:
    global _worker
    # The processes are the parallelism; threads of the tokenizers library would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (encoding, RowEncoder(encoding), Corpus.of(sources, encoding.config))


def _work(chunk: Chunk, folder: Path) -> None:
    assert _worker is not None
    _encode_chunk(*_worker, chunk, folder)


def _encode_chunk(
    encoding: Encoding, encoder: RowEncoder, corpus: Corpus, chunk: Chunk, folder: Path
) -> None:
    name, start, stop = chunk
    with publish(folder / name) as temporary:
        counts = _encode_rows(encoding, encoder, corpus, range(start, stop), temporary)
        counts.save(temporary / _COUNTS)


def _encode_rows(
    encoding: Encoding, encoder: RowEncoder, corpus: Corpus, rows: range, folder: Path
) -> Counts:
    config = encoding.config
    with ChunkWriter(folder) as writer:
        for part, row_format in enumerate(encoding.formats):
            low, high = corpus.part_range(part, rows.start, rows.stop)
            if low >= high:
                continue
            for index, row in corpus.iter_rows(low, high, used_columns(config, row_format)):
                try:
                    if isinstance(row, Broken):
                        raise RowError("broken row", row.reason)
                    writer.add(index, read_id(row, config, index), encoder.encode(row, row_format))
                except RowError as error:
                    writer.reject(index, error)
    return writer.counts


def _key(encoding: Encoding, encoder: RowEncoder, corpus: Corpus, rows: range) -> str:
    """sha256 of everything that decides the store's content."""
    config = encoding.config
    facts = {
        "schema": SCHEMA,
        "corpus": corpus.fingerprint,
        "rows": [rows.start, rows.stop],
        "formats": encoding.formats,
        "columns": config.columns,
        "roles": config.roles,
        "max_length": config.max_length,
        "assistant_only_loss": config.assistant_only_loss,
        "completion_only_loss": config.completion_only_loss is not False,
        "template": encoder.template,
        "vocab_size": encoding.vocab_size,
        "tokenizer": None if encoder.tokenizer is None else tokenizer_hash(encoder.tokenizer),
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _check_any(counts: Counts, num_rows: int) -> None:
    if counts.num_rows == 0:
        kind, count = counts.rejected.most_common(1)[0]
        index, reason = counts.examples[kind]
        raise DataError(
            f"data.path: none of the {num_rows} rows can be used; most often ({count} rows), "
            f"as in row {index}: {reason}"
        )


def _meta(encoding: Encoding, encoder: RowEncoder, corpus: Corpus, counts: Counts) -> dict:
    tokenizer = encoder.tokenizer
    pads = [] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id]
    known_size = encoding.vocab_size or (0 if tokenizer is None else len(tokenizer))
    return {
        "schema": SCHEMA,
        "corpus": corpus.fingerprint,
        "format": encoding.kinds,
        "mask": encoder.mask,
        "num_rows": counts.num_rows,
        "num_tokens": counts.num_tokens,
        "num_label_tokens": counts.num_label_tokens,
        "num_truncated": counts.num_truncated,
        "num_rejected": sum(counts.rejected.values()),
        "rejected": dict(sorted(counts.rejected.items())),
        "pad_token_id": next((pad for pad in pads if pad is not None), 0),
        "vocab_size": max(known_size, counts.largest_token + 1),
    }


def _report(store: TokenStore) -> None:
    meta = store.meta
    kinds = ", ".join(f"{count} {kind}" for kind, count in meta["rejected"].items())
    logger.info(
        "%d rows, %d tokens, %d of them carry loss; %d rows cut at max_length; %d rows rejected%s",
        meta["num_rows"], meta["num_tokens"], meta["num_label_tokens"], meta["num_truncated"],
        meta["num_rejected"], f" ({kinds})" if kinds else "",
    )  # fmt: skip
