"""What the demo runs on, made on the spot: a corpus, and a pretrained model with its tokenizer."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grads_dist.demo.docstrings import read_definitions
from grads_dist.demo.harvest import build_rows, split_rows, write_rows
from grads_dist.demo.pretrain import PretrainResult, pretrain
from grads_dist.demo.size import DemoSize
from grads_dist.demo.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)


class Stopwatch:
    """Wall-clock seconds of named stages, in the order in which they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside, and log that it starts."""
        logger.info("%s ...", name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class Assets:
    """Files the run reads, and how they came to be."""

    corpus: Path
    """Chat rows, one JSON object a line."""
    model: Path
    """Folder with model and tokenizer, as `save_pretrained` writes them."""
    num_definitions: int
    """Docstrings found, before those too short or too long to use were left out."""
    pretraining: PretrainResult


def build_assets(folder: Path, size: DemoSize, watch: Stopwatch) -> Assets:
    """Write `folder`/corpus.jsonl and `folder`/model.

    The same installed packages and `size` give the same corpus and tokenizer. Raises DataError when the
    packages hold too few docstrings for `size`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus, model_folder = folder / "corpus.jsonl", folder / "model"
    with watch.stage("reading docstrings"):
        definitions = read_definitions(size.packages, size.max_files)
        rows, left_over = split_rows(build_rows(definitions, size.max_answer_chars), size.num_rows)
        write_rows(rows, corpus)
    with watch.stage("training the tokenizer"):
        tokenizer = train_tokenizer(rows, size.vocab_size, size.max_length)
        tokenizer.save_pretrained(model_folder)
    with watch.stage("pretraining the model"):
        # On what the corpus leaves over: the probed epoch should be the model's first sight of the corpus.
        model, pretraining = pretrain(left_over, tokenizer, size)
        model.save_pretrained(model_folder)
    return Assets(corpus, model_folder, len(definitions), pretraining)
