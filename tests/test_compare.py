"""`grads-dist select --compare`: several selections of one run side by side."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selection_tables import TARGETS, clustered_features, score_table

from grads_dist import cli
from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.compare import compare_selections, overlap
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.select import select
from grads_dist.selection.write import write_selection
from grads_dist.similarity.config import SimilarityConfig

OPTIONS = {
    "default": SelectionConfig(rows=20),
    "by-loss": SelectionConfig(name="by-loss", rows=50, criterion="loss"),
    "plain": SelectionConfig(name="plain", rows=20, weights=Weights(1, 0, 0)),
}


@pytest.fixture
def chosen(tmp_path):
    """A folder with three selections of one table, and what each of them is."""
    table, features, found = score_table(200), clustered_features(200), {}
    for name, config in OPTIONS.items():
        given = None if name == "plain" else features
        similarity = SimilarityConfig(device="cpu", library="torch")
        found[name] = select(table, given, config, similarity, TARGETS)
        write_selection(found[name], None, RunDir(tmp_path).selection_dir(name))
    return RunDir(tmp_path), found


def cells(text, name):
    """The line about a selection, by column; no cell but that of near-duplicates holds spaces."""
    lines = text.splitlines()
    titles = lines[0].replace("gradient Vendi", "gradient-Vendi").split()
    line = next(line for line in lines if line.startswith(name)).replace(" -> ", "->")
    return dict(zip(titles, line.split(), strict=True))


def test_overlap_of_two_sets():
    jaccard, share = overlap(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6, 7, 8]))
    assert (jaccard, share) == (2 / 8, 2 / 4)
    assert overlap(np.array([1]), np.array([1])) == (1, 1)
    assert overlap(np.array([1]), np.array([2])) == (0, 0)


def test_each_selection_is_a_line(chosen):
    run, found = chosen
    text = compare_selections(run, [])
    line, summary = cells(text, "default"), found["default"].summary
    assert (line["criterion"], line["pick"], line["rows"]) == ("grads", "topk", "20")
    assert line["tokens"] == f"{summary['shares']['num_tokens']['sum_selected']:,}"
    assert line["length"] == f"{summary['shares']['num_label_tokens']['mean_selected']:.1f}"
    assert line["loss"] == f"{summary['shares']['loss']['mean_selected']:.2f}"
    assert line["R"] == f"{found['default'].redundancy[found['default'].selected].mean():.2f}"
    assert line["coverage"] == f"{summary['coverage']['selected'][1]:.1%}"
    assert line["Vendi"] == f"{summary['vendi']['content']['selected']:.1f}"
    assert "gradient-Vendi" not in line  # no selection knows it
    assert cells(text, "by-loss")["rows"] == "50" and cells(text, "by-loss")["G"] == "-"
    plain = cells(text, "plain")
    assert (plain["coverage"], plain["Vendi"], plain["near-duplicates"]) == ("-", "-", "-")


def test_overlaps_are_shown_for_each_pair(chosen):
    run, found = chosen
    text = compare_selections(run, ["plain", "default", "by-loss", "plain"])
    place = text.index("Overlap: shared rows as Jaccard index / share of the smaller selection")
    lines = [line.split() for line in text[place:].splitlines()[1:4]]
    assert lines[0] == ["plain", "default"]
    assert [line[0] for line in lines[1:]] == ["default", "by-loss"]
    jaccard, share = overlap(found["default"].selected_index, found["by-loss"].selected_index)
    assert lines[2][-3:] == [f"{jaccard:.2f}", "/", f"{share:.0%}"]
    assert max(map(len, text.splitlines())) <= 140


def test_one_selection_has_no_overlap(chosen):
    assert "Overlap" not in compare_selections(chosen[0], ["default"])


def test_a_selection_of_an_earlier_version_shows_what_it_knows(chosen):
    run, _ = chosen
    folder = run.selection_dir("old")
    folder.mkdir()
    pq.write_table(pa.table({"index": [3, 1]}), folder / "selected.parquet")
    (folder / "summary.json").write_text(json.dumps({"counts": {"selected": 2}}))
    line = cells(compare_selections(run, ["old"]), "old")
    assert line == {"selection": "old", "rows": "2"}
    assert cells(compare_selections(run, ["old", "by-loss"]), "old")["loss"] == "-"


def test_names_that_are_not_there(chosen, tmp_path, capsys):
    run, _ = chosen
    with pytest.raises(
        ConfigError, match="compare: 'x' is no selection .*; allowed: by-loss, default, plain$"
    ):
        compare_selections(run, ["default", "x"])
    with pytest.raises(ConfigError, match="holds no selection"):
        compare_selections(RunDir(tmp_path / "empty"), [])
    (run.selection_dir("plain") / "selected.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="compare: selection 'plain' cannot be read"):
        compare_selections(run, ["plain"])
    assert cli.main(["select", "--compare", "x", "--output_dir", str(run.root)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_line_takes_names_before_and_after(chosen, capsys):
    folder = str(chosen[0].root)
    assert cli.main(["select", "--compare", "plain", "default", "--output_dir", folder]) == 0
    text = capsys.readouterr().out
    assert text == compare_selections(chosen[0], ["plain", "default"]) + "\n"
    assert cli.main(["select", "--output_dir", folder, "--compare"]) == 0
    assert capsys.readouterr().out == compare_selections(chosen[0], []) + "\n"
