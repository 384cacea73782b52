"""What a probe will cost: the parts of the estimate, in order."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from grads_dist.config import Config
from grads_dist.data.tokenizer import TokenizerSource
from grads_dist.estimate.calibrate import Calibration, Clock, calibrate
from grads_dist.estimate.disk import disk_use
from grads_dist.estimate.facts import Facts, model_facts
from grads_dist.estimate.flops import Flops, flops_of
from grads_dist.estimate.hardware import CPU, Hardware, hardware_named, hardware_of_device
from grads_dist.estimate.needs import Needs, find_needs
from grads_dist.estimate.options import Options
from grads_dist.estimate.report import report
from grads_dist.estimate.sample import Sample, read_sample
from grads_dist.estimate.seconds import guessed_seconds
from grads_dist.estimate.workload import Pass, Rows, idle_share, planned_passes, rows_of, sizes_of
from grads_dist.model.anatomy import dissect
from grads_dist.model.load import build_on_meta, load_text_config
from grads_dist.preflight import absolute, check_before_work
from grads_dist.probe.run import at_checkpoint
from grads_dist.probe.zero import check_supported, load_deepspeed_config, probe_dtype, zero_stage
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks

HISTOGRAM_BINS = 12


@dataclass(frozen=True)
class Planned:
    """What is known before anything is estimated."""

    config: Config
    sample: Sample
    rows: Rows
    passes: list[Pass]
    facts: Facts
    hardware: Hardware
    dtype: torch.dtype
    ranks: int
    checking: float
    """Seconds that it took to find this out, without tokenizing."""


def estimate(config: Config, options: Options) -> str:
    """The text that `grads-dist estimate` prints. Raises what the checks of a run raise."""
    found = measure(config, options)
    return json.dumps(found, indent=2) if options.as_json else report(found)


def measure(config: Config, options: Options, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """The estimate as JSON has it: bytes, seconds, operations and counts by name.

    `clock` is what seconds are measured by.
    """
    planned = _plan(config, options, clock)
    found = {
        "corpus": _corpus(planned),
        "plan": _describe_plan(planned),
        "flops": _flops(planned),
        "model": _model(planned),
    }
    found["time"] = _guess(planned)
    found["memory"] = asdict(_needs(planned))
    usable = planned.sample.num_usable
    tokens = found["corpus"]["tokens"]
    found["disk"] = disk_use(planned.config, planned.facts, usable, tokens, planned.sample.id_bytes)
    if options.calibrate:
        found["calibration"] = _describe_calibration(
            calibrate(planned.config, planned.sample, planned.passes, planned.ranks, planned.checking, clock)
        )
    return found


def _plan(config: Config, options: Options, clock: Clock) -> Planned:
    start = clock()
    here = Ranks.start(detect())
    config = check_before_work(absolute(config), here, selecting=False)
    num_ranks = options.ranks or here.world_size
    name = options.hardware
    if name is None:
        name = CPU
        if here.device.type == "cuda":
            name = hardware_of_device(torch.cuda.get_device_name(here.device))
    hardware = hardware_named(name, num_ranks)
    device = torch.device("cpu" if hardware.name == CPU else "cuda")
    deepspeed = load_deepspeed_config(config.deepspeed)
    dtype = probe_dtype(config.model, deepspeed, device)
    check_supported(config.probe, dtype, zero_stage(deepspeed), device)
    at = at_checkpoint(config, 0) if config.probe.checkpoints else config
    facts = model_facts(dissect(build_on_meta(at.model)), config.probe, dtype)
    model = config.model
    source = TokenizerSource(str(model.name_or_path), model.revision, model.trust_remote_code)
    vocab_size = load_text_config(model).vocab_size
    sample = read_sample(config.data, source, vocab_size, options.sample, config.probe.seed, clock)
    checking = clock() - start - sample.seconds
    rows = rows_of(sample, config.probe.seed)
    passes = planned_passes(config.probe, rows)
    return Planned(config, sample, rows, passes, facts, hardware, dtype, num_ranks, checking)


def _corpus(planned: Planned) -> dict[str, Any]:
    sample = planned.sample
    tokens, tokens_error = sample.total(sample.num_tokens)
    labels, labels_error = sample.total(sample.num_label_tokens)
    lengths = sample.num_tokens
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, HISTOGRAM_BINS + 1).round())
    counts, _ = np.histogram(lengths, edges)
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99])
    return {
        "rows": sample.num_rows,
        "exact": sample.exact,
        "rows_read": sample.num_read,
        "rows_usable": sample.num_usable,
        "tokens": tokens,
        "tokens_error": tokens_error,
        "label_tokens": labels,
        "label_tokens_error": labels_error,
        "share_rejected": 1 - len(lengths) / sample.num_read,
        "share_truncated": sample.num_truncated / len(lengths),
        "lengths": dict(zip(("median", "p90", "p99"), quantiles.tolist(), strict=True))
        | {"max": int(lengths.max())},
        "histogram": {"edges": edges.astype(int).tolist(), "counts": counts.tolist()},
        "cached": sample.cached,
        "target_set": planned.config.data.target is not None and bool(planned.config.probe.feature_names),
    }


def _describe_plan(planned: Planned) -> dict[str, Any]:
    passes = []
    for work in planned.passes:
        sizes = sizes_of(work)
        passes.append(
            {
                "name": work.name,
                "kind": work.kind,
                "steps": round(len(work.groups) * work.times) if work.trains else 0,
                "micro_batches": round(len(sizes.rows) * work.times),
                "padding": 1 - float(sizes.tokens.sum() / sizes.padded.sum()),
                "idle": idle_share(work, planned.ranks),
                "largest_batch": int(sizes.padded.max()),
            }
        )
    probe = planned.config.probe
    return {
        "mode": probe.mode,
        "ranks": planned.ranks,
        "global_batch": probe.global_batch,
        "batch_tokens": probe.batch_tokens,
        "passes": passes,
    }


def _flops(planned: Planned) -> dict[str, Any]:
    config = planned.config
    by_pass = {
        work.name: flops_of(work, planned.facts, config.probe, config.model) for work in planned.passes
    }
    total = sum(by_pass.values(), Flops())
    return {
        "passes": {name: {**flops.parts, "total": flops.total} for name, flops in by_pass.items()},
        **total.parts,
        "total": total.total,
    }


def _model(planned: Planned) -> dict[str, Any]:
    facts = planned.facts
    return {
        "name": planned.config.model.name_or_path,
        "parameters": facts.num_params,
        "trained": facts.num_trained,
        "dtype": str(planned.dtype).removeprefix("torch."),
        "layers": facts.num_layers,
        "layers_reached_backward": facts.num_layers - min(facts.lowest, facts.num_layers),
        "targets": len(facts.targets.members),
        "adapter": planned.config.model.adapter is not None,
    }


def _guess(planned: Planned) -> dict[str, Any]:
    config, hardware = planned.config, planned.hardware
    least = most = 0.0
    for work in planned.passes:
        flops = flops_of(work, planned.facts, config.probe, config.model)
        low, high = guessed_seconds(flops, hardware, planned.dtype == torch.float32, planned.ranks)
        busy = 1 - idle_share(work, planned.ranks)
        least, most = least + low / busy, most + high / busy
    return {
        "hardware": hardware.name,
        "tflops": hardware.tflops_float32 if planned.dtype == torch.float32 else hardware.tflops,
        "utilisation": list(hardware.utilisation),
        "seconds": [least, most],
    }


def _needs(planned: Planned) -> Needs:
    return find_needs(
        planned.config,
        planned.sample,
        planned.passes,
        planned.facts,
        planned.hardware,
        planned.dtype,
        planned.ranks,
    )


def _describe_calibration(found: Calibration) -> dict[str, Any]:
    fits = {
        name: {"timed": fit.num_timed, "error": fit.error, "seconds": fit.seconds.tolist()}
        for name, fit in found.fits.items()
    }
    plain = {name: value for name, value in vars(found).items() if name != "fits"}
    return {**plain, "fits": fits, "start": found.start, "total": found.total}
