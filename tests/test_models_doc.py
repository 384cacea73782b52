"""docs/models.md says what is so."""

from __future__ import annotations

import copy
import re

import torch
from conftest import ROOT
from test_oracle import assert_equal, double, kinds_of, probe
from tiny import ARCHITECTURES, Rows, tiny_model
from torch import nn

from grads_dist.stats.rules import RULES
from grads_dist.stats.targets import NAMES

TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Rows of the first table under a heading."""
    lines = TEXT.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_architectures_are_those_that_the_oracle_runs():
    rows = table("Architectures checked")
    assert {row[0] for row in rows} == {prefix for prefix, _ in ARCHITECTURES.values()}
    always = {"embedding", "lm_head", "layers", "linear", "norms"}
    for name, (prefix, _) in ARCHITECTURES.items():
        row = next(row for row in rows if row[0] == prefix)
        stated = set(row[2].strip("`").split())
        assert stated == set(kinds_of(tiny_model(name))) - always, name


def test_names_of_targets():
    assert [row[0].strip("`") for row in table("Targets")] == list(NAMES)


def test_the_rule_of_the_example_is_right():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(example, names)  # the document's own code
    layer = names["ScaledLinear"]
    try:
        model = tiny_model("gpt_neox")
        old = model.gpt_neox.layers[1].mlp.dense_h_to_4h
        new = layer(old.in_features, old.out_features)
        with torch.no_grad():
            new.weight.copy_(8 * torch.randn_like(new.weight))
        model.gpt_neox.layers[1].mlp.dense_h_to_4h = new
        assert isinstance(new, nn.Linear)
        model = double(model)
        rows = Rows.random(4)
        stats, targets, _ = probe(copy.deepcopy(model), rows, ["layers"])
        assert_equal(stats, targets, model, rows)
    finally:
        del RULES[layer]
