"""The part of a dataset card that says how each trainer loads the subset."""

from __future__ import annotations

from collections.abc import Mapping

from grads_dist.selection.exported import Exported, UnreadableError
from grads_dist.selection.trl import trl_mapping

_LOAD = """\
from datasets import load_dataset

dataset = load_dataset("FOLDER", split="train")
"""
_TRAIN = """\
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(model, args=SFTConfig(output_dir="sft"), train_dataset=dataset)
"""


def stanza_name(name: str) -> str:
    """Name in dataset_info.json of the subset of the selection `name`."""
    return f"grads_{name}"


def loading(exported: Exported, name: str, reasons: Mapping[str, str]) -> str:
    """Markdown; `reasons`: trainer -> why it cannot read the rows, where it cannot."""
    parts = ["FOLDER is the path of this folder:\n", _trl(exported)]
    if "LLaMA-Factory" in reasons:
        parts.append(f"LLaMA-Factory {reasons['LLaMA-Factory']}, so there is no dataset_info.json.\n")
    else:
        stage = "pt" if exported.row_format == "text" else "sft"
        parts.append(
            "LLaMA-Factory, by the stanza in `dataset_info.json`:\n\n"
            f"```yaml\nstage: {stage}\ndataset_dir: FOLDER\ndataset: {stanza_name(name)}\n```\n"
        )
    if "axolotl" in reasons:
        parts.append(f"axolotl {reasons['axolotl']}, so there is no axolotl.yaml.\n")
    else:
        parts.append(
            "axolotl: `axolotl.yaml` holds the entry of `datasets` for your configuration; its paths are\n"
            "relative to this folder.\n"
        )
    return "\n".join([*parts, *_warnings(exported)])


def _trl(exported: Exported) -> str:
    try:
        mapping = trl_mapping(exported)
    except UnreadableError as reason:
        return f"```python\n{_LOAD}```\n\nTRL {reason}: convert the rows before it trains on them.\n"
    convert = f"```python\n{mapping}```\n\n" if mapping else ""
    return f"```python\n{_LOAD}```\n\nTRL, on this dataset:\n\n{convert}```python\n{_TRAIN}```\n"


def _warnings(exported: Exported) -> list[str]:
    if exported.form == "csv":
        return [
            "All values are text. `datasets` reads them so by the header of this card; LLaMA-Factory and\n"
            "axolotl let it guess, so that a 007 becomes a 7 and NA is missing.\n"
        ]
    return []
