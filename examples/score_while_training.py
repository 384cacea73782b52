"""Train with transformers' Trainer as ever, then print the rows that their gradients rank first.

python examples/score_while_training.py [FOLDER]
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from grads_dist import ScoreTableCallback
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.select import select
from grads_dist.similarity.config import SimilarityConfig

TARGETS = ["embedding", "lm_head"]
SUMS = [f"{a:02}+{b:02}={a + b:02}" for a in range(12) for b in range(0, 40, 7)]


def main(folder: Path) -> None:
    """A byte is a token, and the two digits of the sum carry loss."""
    rows = [{"input_ids": list(s.encode()), "labels": [-100] * 6 + list(s[6:].encode())} for s in SUMS]
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    )
    args = TrainingArguments(folder / "trainer", num_train_epochs=1, save_strategy="no", report_to=[])
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.add_callback(ScoreTableCallback(trainer, folder / "run", targets=TARGETS, overwrite=True))
    trainer.train()
    table = pq.read_table(folder / "run" / "scores.parquet")
    wanted = SelectionConfig(
        rows=5, weights=Weights(d=0, r=0)
    )  # d and r compare features, of which it has none
    for index in select(table, None, wanted, SimilarityConfig(), TARGETS).selected_index:
        print(f"row {index}: {SUMS[index]}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example"))
