"""The text that the demo ends with: what was done, and rows from the top to the bottom of the ranking."""

from collections.abc import Iterable, Mapping

import numpy as np

from grads_dist.demo.assets import Assets
from grads_dist.demo.results import Results, choose_examples, epoch_losses, read_results
from grads_dist.runtime.rundir import RunDir

NUM_EXAMPLES = 3
TEXT_WIDTH = 96
TITLES = {
    "top": "Top: the highest scores",
    "median": "Median: the middle of the ranking",
    "shadowed": "Shadowed: the largest similarity reduction R, and the better row each is close to",
    "lowest": "Lowest: the lowest scores",
}


def demo_report(run: RunDir, assets: Assets, processes: int, seconds: Mapping[str, float]) -> str:
    """Return the report of a finished demo run; `seconds` are those of the demo's stages, by name."""
    results = read_results(run, assets.corpus)
    sections = [
        _section("What was done", [*_making(results, assets), *_probing(results, processes)]),
        _section("What was selected", _selecting(results)),
        _section(
            "What it holds of the corpus, by cosines of content, beside as many random rows",
            _holding(results),
        ),
        _section("Seconds", [(name, f"{value:.0f}") for name, value in seconds.items()]),
    ]
    for kind, positions in choose_examples(results.selection, NUM_EXAMPLES).items():
        sections.append("\n".join([TITLES[kind], *(_example(results, int(i)) for i in positions)]))
    sections.append(f"The run is in {run.root}, what it was made from in {assets.corpus.parent}.")
    return "\n\n".join(sections)


def _making(results: Results, assets: Assets) -> list[tuple[str, str]]:
    tokens, label_tokens = (
        int(np.sum(results.table.column(name).to_numpy())) for name in ("num_tokens", "num_label_tokens")
    )
    corpus = (
        f"{len(results.rows):,} rows from {assets.num_definitions:,} docstrings, "
        f"{tokens:,} tokens, {label_tokens:,} of them carry loss"
    )
    pretraining = assets.pretraining
    model = (
        f"Llama with {pretraining.num_parameters / 1e6:.1f} M parameters, pretrained on "
        f"{pretraining.num_tokens:,} tokens of other docstrings, "
        f"loss {pretraining.first_loss:.2f} -> {pretraining.last_loss:.2f}"
    )
    return [("corpus", corpus), ("model", model)]


def _probing(results: Results, processes: int) -> list[tuple[str, str]]:
    first, last = epoch_losses(results.table)
    num_steps = int(results.table.column("step").to_numpy().max()) + 1
    epoch = (
        f"one, {processes} ranks, ZeRO-2, {num_steps} steps, "
        f"loss of the first and last tenth {first:.2f} -> {last:.2f}"
    )
    return [("preliminary epoch", epoch)]


def _selecting(results: Results) -> list[tuple[str, str]]:
    counts, terms, signal = (results.summary[name] for name in ("counts", "terms", "signal"))
    left_out = (
        f"copies of an earlier row: {counts['copies']}, rejected: {counts['rejected'] or 0}, "
        f"with statistics that are not finite: {counts['nonfinite']}"
    )
    correlations = [f"{name} {_signed(value)}" for name, value in terms["correlation"].items()]
    overlaps = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in results.summary["overlap"].items()]
    return [
        ("rows", f"{counts['selected']:,} of {counts['candidates']:,}"),
        ("left out before", left_out),
        ("signal", f"the length of the answer explains R^2 = {signal['length_r2']:.2f} of it, now removed"),
        ("shadowed", f"{terms['share_shadowed']:.0%} of the rows"),
        ("correlations", ", ".join(correlations)),
        ("also picked by", ", ".join(overlaps)),
    ]


def _holding(results: Results) -> list[tuple[str, str]]:
    coverage, redundancy = (results.summary[name] for name in ("coverage", "redundancy"))
    vendi = results.summary["vendi"]["content"]
    all_rows, selected, random = (redundancy[name] for name in ("all", "selected", "random"))
    shares = zip(coverage["thresholds"], coverage["selected"], coverage["random"], strict=True)
    return [
        *(
            (
                f"covered at {threshold}",
                f"{one:.0%} of all rows are this close to a selected row, random: {other:.0%}",
            )
            for threshold, one, other in shares
        ),
        (
            "nearest other row",
            f"cosine {all_rows['mean_nearest']:.2f} on average in the corpus, "
            f"{selected['mean_nearest']:.2f} in the selection, random: {random['mean_nearest']:.2f}",
        ),
        (
            "near-duplicates",
            f"{all_rows['near_duplicates']:.0%} of all rows have one "
            f"(cosine {redundancy['near_duplicate']} or more), "
            f"{selected['near_duplicates']:.0%} of the selected, random: {random['near_duplicates']:.0%}",
        ),
        (
            "variety",
            f"that of {vendi['selected']:.1f} rows without anything in common (Vendi score), "
            f"random: {vendi['random']:.1f}",
        ),
    ]


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.2f}"


def _section(title: str, entries: Iterable[tuple[str, str]]) -> str:
    entries = list(entries)
    width = max(len(name) for name, _ in entries)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in entries)])


def _example(results: Results, i: int) -> str:
    selection, shadow = results.selection, int(results.selection.neighbour[i])
    row = results.rows[selection.index[i]]
    question, answer = (message["content"] for message in row["messages"])
    terms = (selection.gradient[i], selection.diversity[i], selection.redundancy[i])
    lines = [
        f"  #{selection.rank[i]}  {row['id']}",
        f"      score {selection.score[i]:.3f}  (G {terms[0]:.3f}, D {terms[1]:.3f}, R {terms[2]:.3f})",
        f"      user       {_one_line(question)}",
        f"      assistant  {_one_line(answer)}",
    ]
    if shadow >= 0:
        better = results.rows[shadow]
        lines.append(f"      shadowed by {better['id']}")
        lines.append(f"                 {_one_line(better['messages'][1]['content'])}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= TEXT_WIDTH else f"{words[: TEXT_WIDTH - 4]} ..."
