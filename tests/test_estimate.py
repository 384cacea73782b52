"""The estimate of a probe against the token store, torch's counter, DeepSpeed's tensors and the plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import Rows as RandomRows
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from workspace import make_model, make_rows, run_arguments, write_jsonl, write_stage

from grads_dist.commands import prepare
from grads_dist.config import Config
from grads_dist.data.corpus import Corpus
from grads_dist.data.tokenize import tokenize
from grads_dist.data.tokenizer import TokenizerSource
from grads_dist.errors import ConfigError, DataError
from grads_dist.estimate.activations import count_activations
from grads_dist.estimate.advice import advise, way_out
from grads_dist.estimate.disk import row_bytes, token_bytes
from grads_dist.estimate.estimate import measure
from grads_dist.estimate.facts import model_facts
from grads_dist.estimate.fit import COSTS, chosen_batches, cost_columns, fit_costs
from grads_dist.estimate.flops import flops_of
from grads_dist.estimate.hardware import KNOWN, hardware_named, hardware_of_device
from grads_dist.estimate.memory import FROZEN, TRAINED, Batch, rank_memory
from grads_dist.estimate.options import Options
from grads_dist.estimate.sample import read_sample, run_starts
from grads_dist.estimate.workload import (
    MOST_PLANNED,
    BatchSizes,
    Pass,
    Rows,
    idle_share,
    planned_passes,
    rows_of,
    seconds_over_ranks,
    sizes_of,
)
from grads_dist.model.anatomy import dissect
from grads_dist.model.config import ModelConfig
from grads_dist.model.load import load_text_config
from grads_dist.model.probed import ProbedModel
from grads_dist.parsing import build, make_parser, parse
from grads_dist.probe.batches import collate
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.plan import frozen_plan, share_units, train_plan
from grads_dist.probe.session import Session
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.ranks import Ranks
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.targets import resolve_targets

CPU = torch.device("cpu")
EAGER = ModelConfig(attn_implementation="eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("estimate")
    make_model(root / "model")
    write_jsonl(root / "corpus.jsonl", [*make_rows(900), {"messages": "not a chat"}])
    return root


def config_of(folder: Path, **overrides: object) -> Config:
    arguments = run_arguments(folder, "run", **overrides)
    parser = make_parser("test", Config, "")
    return build(parser, parse(parser, arguments, Config), Config)


def sizes(**columns: list[float]) -> BatchSizes:
    return BatchSizes(**{name: np.array(values, np.float64) for name, values in columns.items()})


def some_rows(count: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 60, count)
    return Rows(tokens, rng.integers(1, tokens), np.arange(count), 1.0)


# The corpus


def test_runs_of_rows_are_spread_over_the_corpus_and_do_not_overlap():
    runs = run_starts(100_003, 2000, seed=1)
    assert sum(stop - first for first, stop in runs) == 2000
    assert all(0 <= first < stop <= 100_003 for first, stop in runs)
    assert all(stop <= later for (_, stop), (later, _) in zip(runs, runs[1:], strict=False))
    parts = np.histogram([first for first, _ in runs], 10, (0, 100_003))[0]
    assert parts.min() == parts.max() == len(runs) // 10
    assert run_starts(100_003, 2000, seed=2) != runs
    assert run_starts(50, 2000, seed=1) == [(0, 50)]
    assert run_starts(50, 3, seed=1) != [(0, 50)] and len(run_starts(50, 3, 1)) == 1


def test_sampled_counts_are_those_of_the_store_within_their_error(folder, tmp_path):
    config = config_of(folder, **{"data.cache_dir": tmp_path / "cache"})
    source = TokenizerSource(str(folder / "model"))
    vocab = load_text_config(config.model).vocab_size
    sampled = [read_sample(config.data, source, vocab, 200, seed) for seed in range(4)]
    everything = read_sample(config.data, source, vocab, 10_000, 0)
    store = tokenize(config.data, Corpus.open(config.data), source, vocab_size=vocab)
    cached = read_sample(config.data, source, vocab, 200, 0)
    for exact in (everything, cached):
        assert exact.exact and exact.total(exact.num_tokens) == (store.num_tokens.sum(), 0.0)
        assert exact.total(exact.num_label_tokens) == (store.num_label_tokens.sum(), 0.0)
        assert exact.num_usable == store.num_rows and exact.num_truncated == store.num_truncated
    assert cached.cached and not everything.cached
    for name in ("num_tokens", "num_label_tokens"):
        truth = getattr(store, name).sum()
        for sample in sampled:
            total, error = sample.total(getattr(sample, name))
            assert not sample.exact and sample.num_read == 200
            assert 0 < error < 0.1 * truth
            assert abs(total - truth) < 4 * error
    assert len({sample.total(sample.num_tokens)[0] for sample in sampled}) > 1
    assert tokenizing_is_the_same(sampled[0], store)


def tokenizing_is_the_same(sample, store) -> bool:
    """Whether every sampled row is in the store with its mask."""
    known = {(store.tokens(i).tobytes(), store.loss_mask(i).tobytes()) for i in range(store.num_rows)}
    found = [
        (sample.tokens.tokens(i).tobytes(), sample.tokens.loss_mask(i).tobytes())
        for i in range(len(sample.num_tokens))
    ]
    return len(found) > 0 and set(found) <= known


def test_a_sample_without_a_usable_row_says_why(folder, tmp_path):
    corpus = write_jsonl(tmp_path / "bad.jsonl", [{"messages": "no"}] * 30)
    config = config_of(folder, **{"data.path": corpus, "data.format": "messages"})
    with pytest.raises(DataError, match="none of 10 sampled rows can be used; as row"):
        read_sample(config.data, TokenizerSource(str(folder / "model")), 400, 10, 0)


# The plan


def test_passes_of_each_mode_are_those_of_the_probe():
    rows = some_rows(100)
    plain = planned_passes(ProbeConfig(global_batch=16), rows)
    assert [(p.name, p.kind) for p in plain] == [("features", "features"), ("probe", "probe")]
    assert len(plain[1].groups) == 7
    longer = planned_passes(ProbeConfig(global_batch=16, epochs=3, features="none"), rows)
    assert [p.kind for p in longer] == ["train", "train", "probe"]
    frozen = planned_passes(ProbeConfig(mode="frozen", checkpoints=["a", "b"]), rows)
    assert [(p.kind, p.repeats) for p in frozen] == [("measure", 2)]
    warm = planned_passes(ProbeConfig(global_batch=16, warmup=0.3, warmup_probe="rest"), rows)
    assert [p.kind for p in warm] == ["features", "probe", "measure"]
    assert len(warm[1].groups) == 2
    assert len(warm[2].plan.order) == 100 - 32
    everything = planned_passes(ProbeConfig(global_batch=16, warmup=0.3), rows)
    assert [p.kind for p in everything] == ["features", "train", "measure"]
    assert len(everything[2].plan.order) == 100


def test_sizes_are_those_of_the_plans_micro_batches():
    rows = some_rows(57)
    plan = train_plan(rows.num_tokens, 16, 100, seed=3)
    found = sizes_of(Pass("probe", "probe", plan, rows, range(1, plan.num_groups)))
    first = int(plan.group_offsets[1])
    for m in range(len(found.rows)):
        batch = plan.batch(first + m)
        lengths = rows.num_tokens[batch]
        assert found.rows[m] == len(batch) and found.longest[m] == lengths.max()
        assert found.tokens[m] == lengths.sum() and found.labels[m] == rows.num_label_tokens[batch].sum()
        assert found.padded[m] == len(batch) * lengths.max()
    assert found.ends_step.sum() == plan.num_groups - 1 and found.ends_step[-1] == 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_as_the_probe_does(ranks):
    rows = some_rows(80)
    plan = train_plan(rows.num_tokens, 16, 120, seed=0)
    seconds = np.random.default_rng(1).random(len(plan.batch_offsets) - 1)
    trained = Pass("probe", "probe", plan, rows, range(plan.num_groups))
    expected = 0.0
    for step in range(plan.num_groups):
        batches = plan.batches_of(step)
        for first in range(batches.start, batches.stop, ranks):
            expected += seconds[first : min(first + ranks, batches.stop)].max()
    assert seconds_over_ranks(trained, seconds, ranks) == pytest.approx(expected)
    units = frozen_plan(rows.num_tokens, np.arange(80), 8, 120)
    seconds = np.random.default_rng(2).random(len(units.batch_offsets) - 1)
    swept = Pass("probe", "measure", units, rows, range(units.num_groups))
    shares = share_units(units, rows.num_tokens, ranks)
    loads = [sum(seconds[k] for unit in share for k in units.batches_of(unit)) for share in shares]
    assert seconds_over_ranks(swept, seconds, ranks) == pytest.approx(max(loads))
    assert (idle_share(trained, ranks) == pytest.approx(0)) == (ranks == 1)


def test_a_large_corpus_is_planned_in_part_and_scaled(folder):
    config = config_of(folder)
    source = TokenizerSource(str(folder / "model"))
    sample = read_sample(config.data, source, 400, 100, 0)
    large = replace(sample, num_rows=10 * MOST_PLANNED)
    rows = rows_of(large, seed=0)
    assert len(rows.num_tokens) == MOST_PLANNED
    assert rows.scale * MOST_PLANNED == pytest.approx(large.num_usable)
    assert set(rows.num_tokens) <= set(sample.num_tokens)
    assert np.array_equal(sample.num_tokens[rows.sample_row], rows.num_tokens)


# Operations


def one_batch(rows: RandomRows, kind: str) -> Pass:
    """All rows as one micro-batch."""
    lengths = np.array([len(ids) for ids in rows.ids])
    labels = np.array([mask.sum() for mask in rows.masks])
    plan = train_plan(lengths, len(lengths), 10**6, 0)
    planned = Rows(lengths, labels, np.arange(len(lengths)), 1.0)
    return Pass("probe", kind, plan, planned, range(1))  # type: ignore[arg-type]


def in_place(total, left, right, out_shape=None, **_) -> int:
    """For `addmm_`, which torch's counter leaves out; the head's weight gradient is summed by it."""
    return 2 * left[0] * left[1] * right[1]


def counted(model, rows: RandomRows, training: bool, embedding: bool) -> tuple[float, float]:
    """Operations of a forward and a backward pass, by torch's counter."""
    anatomy = dissect(model)
    probed = ProbedModel(anatomy, None, 1 << 28)
    probed.fuse_head()
    model.requires_grad_(training)
    if embedding and not training:
        anatomy.embedding.register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    batch = collate(rows, np.arange(len(rows.ids)), np.ones(len(rows.ids)), CPU)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        total = probed(batch)
        forward = counter.get_total_flops()
        total.backward()
    return float(forward), float(counter.get_total_flops())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize("training", [True, False])
def test_operations_are_those_that_torch_counts(architecture, training):
    options = {} if architecture == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    model = tiny_model(architecture, attn_implementation="eager", **options)
    rows = RandomRows.random(12, longest=40)
    mode = "train" if training else "frozen"
    probe = ProbeConfig(mode=mode, targets=["embedding"])
    facts = model_facts(dissect(model), probe, torch.float32)
    # `train` is without statistics, which the counter's pass has none of.
    found = flops_of(one_batch(rows, "train" if training else "measure"), facts, probe, EAGER)
    forward, both = counted(model, rows, training, embedding=True)
    # The head's loss makes its own products in the forward pass: move them to compare.
    assert found.statistics == found.shared == 0
    assert found.total == pytest.approx(both, rel=0.01)
    head = 2 * facts.vocab_size * facts.hidden_size * sum(int(mask.sum()) for mask in rows.masks)
    backward_head = head * (2 if training else 1)
    assert found.forward + backward_head == pytest.approx(forward, rel=0.01)


def test_operations_of_a_mixture_count_the_experts_that_a_token_reaches():
    model = tiny_model("mixtral", attn_implementation="eager", experts_implementation="eager")
    rows = RandomRows.random(12, longest=40)
    probe = ProbeConfig(mode="train", targets=["embedding"])
    facts = model_facts(dissect(model), probe, torch.float32)
    found = flops_of(one_batch(rows, "train"), facts, probe, EAGER)
    assert found.total == pytest.approx(counted(model, rows, True, True)[1], rel=0.01)


def test_statistics_cost_a_product_a_sample_unless_training_shares_it():
    model, rows = tiny_model("llama"), RandomRows.random(6, longest=20)
    tokens = sum(map(len, rows.ids))
    found = {}
    for mode, kind in (("train", "probe"), ("frozen", "measure")):
        probe = ProbeConfig(mode=mode, targets=["linear"])
        facts = model_facts(dissect(model), probe, torch.float32)
        found[mode] = flops_of(one_batch(rows, kind), facts, probe, ModelConfig())
        products = 2 * tokens * sum(w.multiplications for w in facts.weights)
    assert found["frozen"].statistics == pytest.approx(products)
    assert found["train"].statistics == 0 and found["train"].shared > 0
    assert found["frozen"].weight_gradients == found["frozen"].shared == 0
    moments = ProbeConfig(mode="frozen", targets=["linear"], statistics="moments")
    facts = model_facts(dissect(model), moments, torch.float32)
    gram = flops_of(one_batch(rows, "measure"), facts, moments, ModelConfig()).statistics
    assert 0 < gram < found["frozen"].statistics


def test_the_backward_pass_ends_at_the_lowest_target():
    model, rows = tiny_model("llama"), RandomRows.random(6)
    passes = {}
    for name, targets in {
        "all": ["embedding"],
        "last": {"last": r"model\.layers\.1\..*weight"},
        "head": ["lm_head"],
    }.items():
        probe = ProbeConfig(mode="frozen", targets=targets)  # type: ignore[arg-type]
        facts = model_facts(dissect(model), probe, torch.float32)
        passes[name] = flops_of(one_batch(rows, "measure"), facts, probe, ModelConfig()).input_gradients
    assert passes["head"] == 0 < passes["last"] < passes["all"]


# Memory


def saved_bytes(model, rows: RandomRows, targets: list[str], training: bool) -> float:
    """What autograd really keeps of a forward pass of the body."""
    model.requires_grad_(training)
    anatomy = dissect(model)
    recorder = Recorder(anatomy, resolve_targets(targets, anatomy))
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = collate(rows, np.arange(len(rows.ids)), np.ones(len(rows.ids)), CPU)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), recorder.batch(batch.layout):
        output = anatomy.body(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
    recorder.detach()
    return sum(size for size, _ in kept.values()) + output.numel() * output.element_size()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [["embedding"], ["linear"]])
def test_counted_activations_are_those_that_autograd_keeps(tmp_path, targets, training):
    model = tiny_model("llama", num_key_value_heads=2)
    model.config.save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path))
    rows = RandomRows([np.arange(32) % 50] * 3, [np.arange(32) > 8] * 3)
    probe = ProbeConfig(mode="train" if training else "frozen", targets=targets)
    facts = model_facts(dissect(model), probe, torch.float32)
    found = count_activations(config, torch.float32, facts.read, training, 32)
    assert found.exact
    real = saved_bytes(model, rows, targets, training)
    assert found.bytes_of(3 * 32, checkpointing=False) == pytest.approx(real, rel=0.02)
    assert found.bytes_of(3 * 32, checkpointing=True) < found.bytes_of(3 * 32, checkpointing=False)
    assert (found.capture > 0) == (not training)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_a_deepspeed_engine(folder, tmp_path, stage, dtype):
    ranks = Ranks.start(detect())
    deepspeed = write_stage(tmp_path, stage, torch_adam=True)
    config = config_of(folder, deepspeed=deepspeed, **{"model.dtype": dtype})
    session = Session(config, ranks)
    rows = RandomRows.random(4)
    session.train_micro_batch(collate(rows, np.arange(4), np.full(4, 0.25), CPU), True, record=True)
    session.update()
    optimizer = session.engine.optimizer
    weights = sum(getattr(p, "ds_tensor", p).nbytes for p in session.model.parameters())
    masters = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    states = sum(tensor.nbytes for tensor in [*masters, *moments])
    kind = getattr(torch, dtype)
    facts = model_facts(dissect(tiny_model("llama", vocab_size=facts_vocab(folder))), config.probe, kind)
    layout = next(layout for layout in TRAINED if layout.stage == stage)
    kept = count_activations(config.model, kind, facts.read, True, 14)
    found = rank_memory(layout, facts, kept, Batch(56, 20, False), config.probe, kind, {}, 1)
    # DeepSpeed pads its flat buffers to a few elements.
    assert found.weights == pytest.approx(weights, rel=0.01)
    assert found.optimizer == pytest.approx(states, rel=0.01)
    assert found.gradients == found.weights
    session.close()


def facts_vocab(folder: Path) -> int:
    return int(load_text_config(ModelConfig(name_or_path=str(folder / "model"))).vocab_size)


EIGHT_B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def large(folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of an 8B model and no weights, and a corpus for its tokenizer."""
    import transformers
    from workspace import make_tokenizer

    root = tmp_path_factory.mktemp("large")
    transformers.LlamaConfig(**EIGHT_B).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    write_jsonl(root / "corpus.jsonl", make_rows(300))
    return root


def test_full_training_of_eight_billion_parameters_needs_128_gb_of_states(large):
    config = config_of(large, **{"model.dtype": "bfloat16", "probe.batch_tokens": 2048})
    found = measure(config, Options(ranks=8, hardware="h200"))
    memory = found["memory"]
    assert found["model"]["parameters"] == pytest.approx(8.03e9, rel=0.01)
    assert memory["states"] == pytest.approx(128e9, rel=0.01)
    fits = {layout["name"]: layout["fits"] for layout in memory["layouts"]}
    assert fits["ZeRO-3"] and fits["frozen, whole on each rank"] and "ZeRO-0" not in fits
    totals = [layout["total"] for layout in memory["layouts"] if layout["stage"] in (1, 2, 3)]
    assert totals[0] > totals[1] > totals[2]
    assert memory["advice"]["layout"] is not None
    config = replace(config, model=replace(config.model, dtype="float32"))
    small = measure(config, Options(ranks=1, hardware="rtx4090"))["memory"]
    assert not any(layout["fits"] for layout in small["layouts"])
    assert small["advice"]["layout"] is None
    for way in ("LoRA", "offload", "frozen", "161 GB"):
        assert way in small["advice"]["text"]


def test_advice_takes_the_first_that_fits_and_as_many_tokens():
    def memory_of(layout, padded, recompute):
        sample = rank_memory_of(1000.0 if layout.stage == 1 else 100.0, padded * (1 if recompute else 4))
        return sample

    found = advise(TRAINED[1:4], memory_of, 4000.0, 512, 100, 10_000, False)
    assert found.layout is TRAINED[1] and not found.checkpointing and found.batch_tokens == 512
    tight = advise(TRAINED[1:4], memory_of, 800.0, 512, 100, 10_000, False)
    assert tight.layout is TRAINED[2] and not tight.checkpointing and tight.batch_tokens == 128
    assert advise(TRAINED[1:4], memory_of, 400.0, 512, 100, 10_000, False).checkpointing
    assert advise(TRAINED[1:4], memory_of, 10.0, 512, 100, 10_000, False).layout is None
    idle = advise(TRAINED[1:4], memory_of, 1e9, 512, 100, 1100, False)
    assert idle.batch_tokens == 1024 and "nothing to do" in idle.note
    assert "quantised" in way_out(False, False, 1.0, 2)


def rank_memory_of(weights: float, activations: float):
    from grads_dist.estimate.memory import RankMemory

    return RankMemory(weights, 0, 0, activations, 0, 0, 0, 0)


# Disk


def test_the_token_cache_takes_what_was_said(folder, tmp_path):
    config = config_of(folder, **{"data.cache_dir": tmp_path / "cache"})
    source = TokenizerSource(str(folder / "model"))
    store = tokenize(config.data, Corpus.open(config.data), source, vocab_size=400)
    real = sum(path.stat().st_size for path in store.path.glob("*.npy"))
    id_bytes = sum(len(i.encode()) for i in store.ids) / store.num_rows
    expected = token_bytes(store.num_rows, float(store.num_tokens.sum()), id_bytes)
    headers = 128 * len(list(store.path.glob("*.npy")))
    assert expected == pytest.approx(real - headers, abs=32)  # Offsets have one entry more.


def test_a_row_of_the_table_is_as_wide_as_its_schema():
    fixed = 8 + 4 * 6 + 8 + (4 + 5) + (4 + 2)
    assert row_bytes((), 5) == fixed
    assert row_bytes(("a", "b"), 5) - fixed == 2 * (8 + 8 + 5 * 4 + 8)


# Time


def test_costs_are_found_again_and_never_negative():
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 30, 40).astype(float)
    longest = rng.integers(10, 200, 40).astype(float)
    found = sizes(
        rows=rows.tolist(),
        longest=longest.tolist(),
        tokens=(rows * longest * 0.9).tolist(),
        labels=(rows * longest * rng.uniform(0.2, 0.8, 40)).tolist(),
        ends_step=(np.arange(40) % 2).tolist(),
    )
    costs = np.array([1e-2, 3e-5, 1e-7, 2e-5, 1e-3, 5e-2])
    assert len(costs) == len(COSTS) == cost_columns(found).shape[1]
    fit = fit_costs(found, cost_columns(found) @ costs)
    assert fit.seconds == pytest.approx(costs, rel=1e-4) and fit.error < 1e-6
    noisy = fit_costs(found, cost_columns(found) @ costs * rng.uniform(0.5, 1.5, 40))
    assert (noisy.seconds >= 0).all() and noisy.error > 0.05
    falling = fit_costs(found, 1 / (rows * longest))
    assert (falling.seconds >= 0).all()


def test_timed_micro_batches_reach_from_the_smallest_to_the_largest():
    rows = some_rows(400)
    plan = train_plan(rows.num_tokens, 32, 200, seed=0)
    found = sizes_of(Pass("probe", "probe", plan, rows, range(plan.num_groups)))
    chosen = chosen_batches(found, 12)
    assert len(set(chosen)) == len(chosen) <= 12
    padded = found.padded[chosen]
    assert padded.min() == found.padded.min() and padded.max() == found.padded.max()
    assert len(chosen_batches(found, 10_000)) == len(found.rows)


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_calibration_adds_up(folder, mode, monkeypatch):
    monkeypatch.setattr("grads_dist.estimate.calibrate.NUM_BATCHES", 4)
    monkeypatch.setattr("grads_dist.estimate.calibrate._time_imports", lambda clock: 1.5)
    config = config_of(folder, **{"probe.mode": mode, "data.limit": 120})
    found = measure(config, Options(sample=60, calibrate=True, ranks=2))
    timed = found["calibration"]
    assert set(timed["passes"]) == {work["name"] for work in found["plan"]["passes"]}
    assert all(seconds > 0 for seconds in timed["passes"].values())
    assert timed["imports"] == 1.5 and timed["loading"] > 0
    assert timed["total"] == pytest.approx(timed["start"] + sum(timed["passes"].values()))
    assert not (folder / "run").exists()


def test_calibration_of_several_ranks_is_refused(folder, monkeypatch):
    monkeypatch.setattr("grads_dist.estimate.calibrate.detect", lambda: SimpleNamespace(world_size=2))
    with pytest.raises(ConfigError, match="calibrate: 2 ranks are running it; allowed: one, and --ranks 2"):
        measure(config_of(folder), Options(sample=60, calibrate=True))


# The command


def test_json_holds_what_the_text_says(folder):
    text = prepare(["estimate", "--sample", "100", *run_arguments(folder, "run")])()
    found = json.loads(prepare(["estimate", "--json", "--sample", "100", *run_arguments(folder, "run")])())
    for title in ("Corpus", "Tokens a row", "Plan", "Model and operations", "Time", "Memory", "Disk"):
        assert f"\n{title}\n" in f"\n{text}"
    assert found["corpus"]["rows"] == 901 and f"{901:,}" in text
    assert sum(found["corpus"]["histogram"]["counts"]) in (99, 100)
    steps = found["plan"]["passes"][-1]["steps"]
    assert steps == -(-found["corpus"]["rows_usable"] // 8) and f"{steps} steps" in text
    assert found["memory"]["advice"]["text"] in text
    assert not (folder / "run").exists()


def test_a_known_gpu_is_recognised_and_others_are_named():
    assert hardware_of_device("NVIDIA A100-SXM4-80GB") == "a100-80"
    assert hardware_of_device("NVIDIA H100 80GB HBM3") == "h100"
    assert hardware_of_device("NVIDIA H200") == "h200"
    assert hardware_of_device("NVIDIA GeForce RTX 4090") == "rtx4090"
    with pytest.raises(ConfigError, match="'Tesla T4', is not in the table; allowed: --hardware"):
        hardware_of_device("Tesla T4")
    for name in KNOWN:
        assert hardware_named(name, 2).memory > 0
    assert hardware_named("cpu", 4).memory == pytest.approx(hardware_named("cpu", 1).memory / 4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sample", "0"], "sample: 0 is not allowed; allowed: a whole number of at least 1"),
        (["--sample", "many"], "sample: 'many' is not allowed; allowed: a whole number"),
        (["--ranks", "-2"], "ranks: -2 is not allowed"),
        (["--hardware", "tpu"], "hardware: 'tpu' is not known; allowed: a100-40, a100-80, h100"),
    ],
)
def test_bad_usage_gives_one_line(folder, flags, message):
    with pytest.raises(ConfigError) as caught:
        prepare(["estimate", *flags, *run_arguments(folder, "run")])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_frozen_layouts_keep_no_states():
    assert all(not layout.training for layout in FROZEN)
