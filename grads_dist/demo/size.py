"""How large the demo is: every number that trades its time for its meaning."""

from dataclasses import dataclass

STDLIB = "stdlib"


@dataclass(frozen=True)
class DemoSize:
    """The sizes of corpus, tokenizer, model and run; the defaults take some minutes on two cores."""

    packages: tuple[str, ...] = (STDLIB, "numpy", "torch", "transformers", "deepspeed", "datasets", "pyarrow")
    """Where docstrings are read from, `stdlib` being the standard library; an absent package is left out."""
    max_files: int = 500
    """Most files read of one package."""
    num_rows: int = 5500
    """Rows of the corpus; the docstrings left over are what the model is pretrained on."""
    max_answer_chars: int = 500
    """An answer keeps as many of the docstring's leading paragraphs as fit in this."""
    vocab_size: int = 4096
    """Entries of the tokenizer, special tokens included."""
    hidden_size: int = 192
    """Width of the model; its MLP is 8/3 as wide."""
    num_layers: int = 4
    """Decoder layers of the model."""
    num_heads: int = 6
    """Attention heads of a layer."""
    pretrain_steps: int = 480
    """Optimizer steps of the pretraining."""
    pretrain_batch: int = 4
    """Sequences of a pretraining step."""
    sequence_length: int = 128
    """Tokens of a pretraining sequence."""
    max_length: int = 512
    """`data.max_length` of the run, and the model's longest context."""
    global_batch: int = 32
    """`probe.global_batch` of the run: samples of one optimizer step of the preliminary epoch."""
    batch_tokens: int = 1024
    """`probe.batch_tokens` of the run: padded tokens of one forward and backward pass on a rank."""
    seed: int = 0
    """Seed of the model's initial weights and of the order of the pretraining text."""


TINY = DemoSize(
    packages=(STDLIB,),
    max_files=100,
    num_rows=160,
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    pretrain_steps=12,
    pretrain_batch=4,
    sequence_length=64,
    global_batch=16,
    batch_tokens=2048,
)
"""Seconds instead of minutes: for trying the chain of stages, not for looking at what it picks."""
