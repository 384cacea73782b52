"""Writes the score table during somebody's own `transformers.Trainer` or TRL `SFTTrainer` run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grads_dist import provenance
from grads_dist.errors import ConfigError, DataError, GradsDistError
from grads_dist.identity import SCHEMA
from grads_dist.library.corpus_link import link_corpus
from grads_dist.library.epoch_table import EpochTable, finish_table
from grads_dist.library.recording import DEFAULT_TARGETS, Recording
from grads_dist.library.rows import KEY, ids_of, numbered
from grads_dist.library.trainer_checks import check_trainer
from grads_dist.runtime.rundir import RunDir
from grads_dist.stats.head_request import HeadResult

log = logging.getLogger(__name__)
T = TypeVar("T")


class ScoreTableCallback(TrainerCallback):
    """Reads per-sample gradients while a trainer trains its first epoch, and writes them as a run directory.

        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator)
        trainer.add_callback(ScoreTableCallback(trainer, "run"))
        trainer.train()

    The training is that without the callback. `run/scores.parquet` then has one row for each row of
    `trainer.train_dataset`, `index` being its number there, and can be selected from. After the first epoch
    nothing is read any more.

    Args:
        trainer: a Trainer or SFTTrainer.
        output_dir: the run directory; on a file system that all ranks share.
        targets: as for `record`.
        corpus: the file whose rows the dataset holds, in order, if there is one: with it `grads-dist select
            --output_dir run` writes a subset of that file.
        overwrite: replace an earlier run in `output_dir`.
        shard_rows: rows a rank keeps in memory before it writes them.

    Raises ConfigError naming the option of the trainer under which samples cannot be told apart, or a target
    or a folder that cannot be used.
    """

    def __init__(
        self,
        trainer: Any,
        output_dir: str | Path,
        targets: Sequence[str] | Mapping[str, str] = DEFAULT_TARGETS,
        corpus: str | Path | None = None,
        overwrite: bool = False,
        shard_rows: int = 2048,
    ) -> None:
        check_trainer(trainer)
        self._trainer, self._targets, self._overwrite = trainer, targets, overwrite
        self._shard_rows, self._corpus = shard_rows, corpus
        self._fingerprint: str | None = None
        self._done = False
        self._rundir = RunDir(Path(output_dir))
        self._rundir.check(overwrite)
        self._recording: Recording | None = None
        self._table: EpochTable | None = None
        self._num_rows = 0
        self._loader, self._step = trainer.get_train_dataloader, trainer.training_step
        trainer.get_train_dataloader, trainer.training_step = self._numbered_loader, self._training_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the run directory and attach to the model, now that it is wrapped."""
        if self._done:
            return
        # What an earlier training left that an error ended elsewhere, where no callback hears of it.
        self._detach()
        trainer = self._trainer
        if args is not trainer.args:
            raise ConfigError("ScoreTableCallback: added to another trainer than it was made for")
        self._check_epoch(args, state, kwargs["train_dataloader"])
        self._num_rows = len(trainer.train_dataset)
        self._recording = Recording(trainer.model_wrapped, self._targets)
        try:
            self._on_main(self._prepare)
        except GradsDistError:
            self._detach()
            raise
        self._table = EpochTable(
            self._rundir,
            self._recording.targets,
            partial(ids_of, trainer.train_dataset),
            trainer.accelerator.process_index,
            self._shard_rows,
        )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the first epoch: leave the model alone and write the table."""
        if self._recording is None or self._table is None:
            return
        recording, table = self._recording, self._table
        self._detach()
        table.flush()
        # Also a barrier: every rank's shards are there.
        found = gather_object([(table.rejected, table.num_nonfinite)])
        rejected = set().union(*(part for part, _ in found))
        manifest = {
            "schema": SCHEMA,
            "corpus": self._fingerprint,
            "targets": {name: {"numel": numel} for name, numel in recording.targets.numel.items()},
            "features": {},
            "plan": {
                "optimizer_steps": state.global_step,
                "rows": self._num_rows - len(rejected),
                "world_size": self._trainer.accelerator.num_processes,
            },
            "nonfinite_rows": sum(count for _, count in found),
        }
        self._on_main(lambda: self._finish(rejected, manifest))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the trainer its own methods back."""
        if not self._done:
            self._detach()
            self._trainer.get_train_dataloader, self._trainer.training_step = self._loader, self._step
        self._done = True

    def _check_epoch(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        """Refuse a training that does not see every row from the start."""
        if state.global_step:
            raise ConfigError(
                "ScoreTableCallback: training resumes from a checkpoint, and the rows before it would be "
                "missing; allowed: a training from the start"
            )
        steps = -(-len(loader) // args.gradient_accumulation_steps)
        if state.max_steps < steps:
            raise ConfigError(
                f"ScoreTableCallback: max_steps {state.max_steps} ends before the first epoch does; allowed: "
                f"at least {steps}"
            )

    def _numbered_loader(self) -> Any:
        with numbered(self._trainer):
            return self._loader()

    def _training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own step on a batch without the facts of its rows, and their record."""
        if KEY not in inputs:
            raise ConfigError(
                f"ScoreTableCallback: {type(self._trainer).__name__} builds its training batches in a way "
                f"that loses the numbers of the rows"
            )
        facts = inputs.pop(KEY)
        if self._recording is None or self._table is None:
            return self._step(model, inputs, *args, **kwargs)
        recording, number = self._recording, self._trainer.state.global_step
        with ExitStack() as failing:
            failing.callback(self._detach)
            with recording.reading():
                loss = self._step(model, inputs, *args, **kwargs)
            if recording.factors is None or recording.loss is None or recording.el2n is None:
                raise ConfigError(
                    "ScoreTableCallback: the training's loss is not the one the model makes of its labels"
                )
            head = HeadResult(losses=recording.loss, el2n=recording.el2n)
            self._table.add(facts, head, recording.statistics(), number)
            failing.pop_all()
        return loss

    def _prepare(self) -> None:
        self._rundir.create(self._overwrite)
        if self._corpus is not None:
            self._fingerprint = link_corpus(self._rundir, self._corpus, self._targets, self._num_rows)

    def _detach(self) -> None:
        if self._recording is not None:
            self._recording.detach()
        self._recording = self._table = None

    def _finish(self, rejected: set[int], manifest: dict[str, Any]) -> None:
        accelerator = self._trainer.accelerator
        environment = provenance.environment(accelerator.num_processes, str(accelerator.device), "trainer")
        try:
            rows = finish_table(self._rundir, self._num_rows, rejected, manifest, environment)
        except DataError as error:
            # Somebody's training is not ended for it.
            log.error("the score table is not complete: %s", error)
            return
        log.info("score table of %d rows (%d rejected): %s", rows, len(rejected), self._rundir.scores)

    def _on_main(self, fn: Callable[[], T]) -> None:
        """Run `fn` on the first rank and raise its error on all. Collective."""
        error: list[GradsDistError | None] = [None]
        if self._trainer.accelerator.is_main_process:
            try:
                fn()
            except GradsDistError as found:
                error[0] = found
        broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]
