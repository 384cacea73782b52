"""What the score table costs inside somebody's own training: epochs with the callback against epochs without.

    python benchmarks/bench_callback.py            a random 5M-parameter Llama, synthetic rows
    python benchmarks/bench_callback.py --smoke    a few seconds, to see that it works

Every epoch is a whole `trainer.train()`: data loading, optimizer steps, and with the callback the shards and
the merged table. All variants train on the same rows, in an order drawn anew for each set of rows, in one
process; ratios are to the same trainer without the callback on the same rows. Before anything is timed, the
tables of all variants are compared. The learning rate is 0, so that all stay at the same weights; an update
costs the same.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from datasets import Dataset
from report import format_table, provenance, write_csv
from timing import Spread, time_in_turns
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from workload import PAD, SMOKE, Size, save_random_model, synthetic_rows

from grads_dist import ScoreTableCallback

COLUMNS = (
    "variant trainer targets samples_per_s tokens_per_s ratio_median ratio_p25 ratio_p75 ratio_min ratio_max "
    "device threads cpu_model torch deepspeed transformers trl commit date model_params corpus "
    "rows_per_epoch num_epochs num_tokens batch_rows"
).split()
TABLE = "variant samples_per_s tokens_per_s ratio_median ratio_p25 ratio_p75".split()
BATCH_ROWS = 8
TOLERANCE = 1e-4
"""Relative difference allowed between two float32 passes over the same batches."""


@dataclass(frozen=True)
class Variant:
    """A trainer, and what the callback reads in it; `base` is the one it is compared with."""

    name: str
    trainer: type[Trainer]
    targets: tuple[str, ...]
    base: str


VARIANTS = (
    Variant("trainer", Trainer, (), "trainer"),
    Variant("trainer+table", Trainer, ("embedding", "lm_head"), "trainer"),
    Variant("trainer+table-linear", Trainer, ("embedding", "lm_head", "linear"), "trainer"),
    Variant("sft", SFTTrainer, (), "sft"),
    Variant("sft+table", SFTTrainer, ("embedding", "lm_head"), "sft"),
    Variant("sft+table-linear", SFTTrainer, ("embedding", "lm_head", "linear"), "sft"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, write the CSV and print the table."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    logging.getLogger("grads_dist").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        rows = run(args, Path(temporary))
    name = "bench_callback_smoke" if args.smoke else f"bench_callback_{device().type}"
    out = Path(args.out or (tempfile.mkdtemp() if args.smoke else Path(__file__).parent / "results"))
    write_csv(out / f"{name}.csv", COLUMNS, rows)
    print(format_table(TABLE, rows))
    print(out / f"{name}.csv")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --smoke changes the sizes' defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, help="sets of rows that are timed (8)")
    parser.add_argument("--rows", type=int, help="rows in a set (128)")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument(
        "--out", help="folder of the CSV; default: benchmarks/results, a temporary one in smoke"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="toy sizes; the numbers mean nothing")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (2 if args.smoke else 8)
    args.rows = args.rows or (16 if args.smoke else 128)
    return args


def device() -> torch.device:
    """Where the trainers put the model."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """One row of results a variant."""
    size = SMOKE if args.smoke else Size()
    model_folder = str(save_random_model(folder / "model", size, args.seed))
    # One more set of rows than is timed: all are warm, and compared, after it.
    sets = [draw(args.rows, size, model_folder, args.seed + k) for k in range(args.epochs + 1)]
    models = {kind: AutoModelForCausalLM.from_pretrained(model_folder) for kind in (Trainer, SFTTrainer)}
    epochs = {
        (variant.name, k): epoch(variant, models[variant.trainer], sets[k], folder / variant.name / str(k))
        for variant in VARIANTS
        for k in range(len(sets))
    }
    for variant in VARIANTS:
        epochs[variant.name, args.epochs]()
    check_equal([folder / v.name / str(args.epochs) / "run" for v in VARIANTS if v.targets])
    steps = {v.name: (lambda k, name=v.name: epochs[name, k]()) for v in VARIANTS}
    seconds = time_in_turns(steps, range(args.epochs), args.seed, device())
    tokens = sum(len(ids) for rows in sets[:-1] for ids in rows["input_ids"])
    constants = provenance(device()) | {
        "trl": metadata.version("trl"),
        "model_params": sum(p.numel() for p in models[Trainer].parameters()),
        "corpus": "synthetic",
        "rows_per_epoch": args.rows,
        "num_epochs": args.epochs,
        "num_tokens": tokens,
        "batch_rows": BATCH_ROWS,
    }
    return [result(v, seconds, args.epochs * args.rows, tokens) | constants for v in VARIANTS]


def draw(count: int, size: Size, model_folder: str, seed: int) -> Dataset:
    """Synthetic rows as a tokenized dataset."""
    rows, _ = synthetic_rows(count, size, model_folder, seed)
    tokens = [rows.tokens(i).tolist() for i in range(count)]
    labels = [np.where(rows.loss_mask(i), rows.tokens(i), -100).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": tokens, "labels": labels})


def epoch(variant: Variant, model: torch.nn.Module, rows: Dataset, folder: Path) -> Callable[[], object]:
    """A training of one epoch, ready to start; its table goes to `folder`/run."""
    sft = variant.trainer is SFTTrainer
    options = {"max_length": None, "bf16": False, "gradient_checkpointing": False} if sft else {}
    args = (SFTConfig if sft else TrainingArguments)(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_ROWS,
        num_train_epochs=1,
        learning_rate=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device().type == "cuda",
        **options,
    )
    collator = DataCollatorForLanguageModeling(pad_token_id=PAD)
    extra = {"processing_class": tokenizer()} if sft else {}
    trainer = variant.trainer(model, args, train_dataset=rows, data_collator=collator, **extra)
    trainer.remove_callback(transformers.PrinterCallback)
    if variant.targets:
        trainer.add_callback(ScoreTableCallback(trainer, folder / "run", targets=list(variant.targets)))
    return trainer.train


def tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer asks for one; the rows are tokens already."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"<pad>": PAD, "<eos>": 1}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")


def check_equal(runs: Sequence[Path]) -> None:
    """Raise AssertionError when two variants measured different gradients of the head or the embedding."""
    tables = [pq.read_table(folder / "scores.parquet") for folder in runs]
    for name in ("loss", "embedding.norm", "embedding.max", "lm_head.norm", "lm_head.min"):
        columns = [table[name].to_numpy() for table in tables]
        for folder, column in zip(runs, columns, strict=True):
            np.testing.assert_allclose(column, columns[0], rtol=TOLERANCE, err_msg=f"{folder} {name}")


def result(variant: Variant, seconds: dict[str, np.ndarray], num_rows: int, tokens: int) -> dict[str, object]:
    """Speed of one variant over all epochs and its ratios to its base."""
    own, spread = seconds[variant.name], Spread.of(seconds[variant.name], seconds[variant.base])
    return {
        "variant": variant.name,
        "trainer": variant.trainer.__name__,
        "targets": " ".join(variant.targets),
        "samples_per_s": num_rows / float(own.sum()),
        "tokens_per_s": tokens / float(own.sum()),
        **{f"ratio_{name}": getattr(spread, name) for name in ("median", "p25", "p75", "min", "max")},
    }


if __name__ == "__main__":
    main()
