"""The estimate as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grads_dist.estimate.fit import COSTS

BAR = 40
GIB = 2**30


def report(found: dict[str, Any]) -> str:
    """Text of an estimate, as `measure` gives it."""
    sections = [
        _section("Corpus", _corpus(found["corpus"])),
        _histogram(found["corpus"]),
        _section("Plan", _plan(found["plan"])),
        _section("Model and operations", _operations(found["model"], found["flops"])),
        _section("Time", _time(found["time"], found["plan"], found.get("calibration"))),
        _memory(found["memory"], found["plan"]),
        _section("Disk", _disk(found["disk"])),
    ]
    return "\n\n".join(sections)


def _corpus(corpus: dict[str, Any]) -> list[tuple[str, str]]:
    exact = corpus["exact"]
    how = "all rows tokenized"
    if corpus["cached"]:
        how = "from the token cache"
    elif not exact:
        how = f"estimated from {corpus['rows_read']:,} rows"

    def count(name: str) -> str:
        if exact:
            return f"{corpus[name]:,.0f}"
        return f"{corpus[name]:,.0f} +- {corpus[f'{name}_error']:,.0f} (standard error)"

    lengths = corpus["lengths"]
    entries = [
        ("rows", f"{corpus['rows']:,}; {how}"),
        ("tokens", count("tokens")),
        ("label tokens", count("label_tokens")),
        (
            "lengths",
            f"median {lengths['median']:,.0f}, 90 % {lengths['p90']:,.0f}, 99 % {lengths['p99']:,.0f}, "
            f"longest {lengths['max']:,}",
        ),
        ("cut", f"{corpus['share_truncated']:.1%} of the rows at max_length"),
        ("rejected", f"{corpus['share_rejected']:.1%} of the rows"),
    ]
    if corpus["target_set"]:
        entries.append(("target set", "its features are not in this estimate"))
    return entries


def _histogram(corpus: dict[str, Any]) -> str:
    edges, counts = corpus["histogram"]["edges"], corpus["histogram"]["counts"]
    labels = [f"{low} - {high - 1}" for low, high in zip(edges, edges[1:], strict=False)]
    width = max(map(len, labels))
    most = max(counts)
    total = sum(counts)
    lines = [
        f"  {label:>{width}}  {'#' * -(-BAR * count // most):<{BAR}} {count / total:.1%}"
        for label, count in zip(labels, counts, strict=True)
    ]
    return "\n".join(["Tokens a row", *lines])


def _plan(plan: dict[str, Any]) -> list[tuple[str, str]]:
    entries = []
    for work in plan["passes"]:
        steps = f"{work['steps']:,} steps, " if work["steps"] else ""
        idle = f", ranks idle {work['idle']:.0%} of the time" if plan["ranks"] > 1 else ""
        entries.append(
            (
                work["name"],
                f"{steps}{work['micro_batches']:,} micro-batches, {work['padding']:.1%} padding{idle}; "
                f"{_KINDS[work['kind']]}",
            )
        )
    return entries


_KINDS = {
    "features": "forward pass for content features",
    "train": "training without statistics",
    "probe": "training with statistics",
    "measure": "statistics at fixed weights",
}


def _operations(model: dict[str, Any], flops: dict[str, Any]) -> list[tuple[str, str]]:
    trained = "none" if not model["trained"] else _count(model["trained"])
    entries = [
        (
            "model",
            f"{_count(model['parameters'])} parameters ({trained} trained), {model['layers']} layers, "
            f"{model['dtype']}, {model['targets']} target{'s' * (model['targets'] != 1)}",
        ),
        ("backward pass", f"through {model['layers_reached_backward']} of {model['layers']} layers"),
        ("operations", f"{flops['total']:.2e} FLOPs"),
    ]
    entries += [
        (f"  {name}", f"{flops[key]:.2e} ({flops[key] / flops['total']:.0%})")
        for key, name in _FLOPS.items()
        if flops[key]
    ]
    return entries


_FLOPS = {
    "forward": "forward",
    "recomputed": "forward again",
    "input_gradients": "gradients by inputs",
    "weight_gradients": "weight gradients",
    "shared": "weight gradients shared with statistics",
    "statistics": "statistics alone",
}


def _time(
    guess: dict[str, Any], plan: dict[str, Any], calibration: dict[str, Any] | None
) -> list[tuple[str, str]]:
    low, high = guess["seconds"]
    least, most = guess["utilisation"]
    ranks = f"{plan['ranks']} rank{'s' * (plan['ranks'] != 1)}"
    entries = [
        (
            f"on {guess['hardware']}",
            f"{duration(low)} to {duration(high)} for the passes, {ranks}: a guess, at {most:.0%} to "
            f"{least:.0%} of {guess['tflops']:.3g} TFLOP/s",
        )
    ]
    if calibration is None:
        return [*entries, ("", "--calibrate times real batches on this machine instead")]
    entries.append(
        (
            "measured",
            f"{duration(calibration['total'])} in all, {ranks} like this one ({calibration['device']})",
        )
    )
    parts = [
        ("imports", "imports"),
        ("checks", "checking"),
        ("tokenizing", "tokenizing"),
        ("loading", "loading"),
    ]
    entries += [(f"  {name}", duration(calibration[key])) for name, key in parts]
    for name, seconds in calibration["passes"].items():
        fit = calibration["fits"][name]
        costs = ", ".join(
            f"{1e6 * cost:.3g} us {what}" for what, cost in zip(COSTS, fit["seconds"], strict=True) if cost
        )
        about = f"{fit['timed']} micro-batches timed, {fit['error']:.0%} off the fit: {costs}"
        entries.append((f"  {name}", f"{duration(seconds)} ({about})"))
    return entries


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, with two or three digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _memory(memory: dict[str, Any], plan: dict[str, Any]) -> str:
    head = ("GiB a rank", *_PARTS, "total", "fits", "checkpointed", "fits")
    lines = [head]
    for layout in memory["layouts"]:
        parts = [_gib(layout[part]) for part in _PARTS]
        lines.append(
            (
                layout["name"],
                *parts,
                _gib(layout["total"]),
                _yes(layout["fits"]),
                _gib(layout["total_checkpointing"]),
                _yes(layout["fits_checkpointing"]),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    batch = memory["batch"]
    counted = "counted" if memory["counted"] else "a rule of thumb"
    entries = [
        (
            "largest batch",
            f"{batch['padded_tokens']:,.0f} padded tokens, longest row {batch['longest']:,}; "
            f"activations {counted}",
        ),
        ("device", f"{memory['hardware']}, {_gib(memory['device_memory'])} GiB a rank"),
        ("host of rank 0", f"{_gib(memory['host'])} GiB beside what is offloaded"),
    ]
    if memory["states"]:
        entries.append(
            (
                "training state",
                f"{memory['states'] / 1e9:,.3g} GB over all ranks, at stages 1 to 3",
            )
        )
    offloaded = [layout for layout in memory["layouts"] if layout["host"]]
    entries += [
        ("offloaded", f"{_gib(layout['host'])} GiB a rank in the memory of its node") for layout in offloaded
    ]
    entries.append(("advice", memory["advice"]["text"]))
    return "\n".join([_section("Memory", entries), *table])


_PARTS = ("weights", "gradients", "optimizer", "activations", "capture", "head", "buckets")


def _disk(disk: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = disk["training_checkpoints"]
    entries = [
        ("token cache", _size(disk["tokens"])),
        ("score shards", f"{_size(disk['score_shards'])}, {disk['score_row']:.0f} bytes a row uncompressed"),
        ("scores.parquet", f"{_size(disk['scores'])} at most"),
    ]
    if disk["features"]:
        entries.append(("features", f"{_size(disk['features'])}, and as much in shards"))
    if disk["model"]:
        entries.append(("model/", _size(disk["model"])))
    entries.append(("together", _size(disk["total"])))
    if high:
        entries.append(
            ("checkpoints", f"{_size(low)} to {_size(high)} where training keeps them, two at a time")
        )
    return entries


def _size(num_bytes: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def _gib(num_bytes: float) -> str:
    value = num_bytes / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _section(title: str, entries: Iterable[tuple[str, str]]) -> str:
    entries = list(entries)
    width = max(len(name) for name, _ in entries)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in entries)])
