"""How often the host waits for a GPU in a micro-batch, counted with the kernels emulated on a CPU."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from head_checks import forced
from kernel_emulator import EmulatedLauncher, missing
from tiny import Rows, tiny_model
from waits import Waits
from workspace import make_model, make_rows, run_arguments, write_jsonl

from grads_dist.commands import prepare
from grads_dist.model.anatomy import check_head, dissect
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.batches import collate
from grads_dist.probe.session import Session
from grads_dist.stats import backend, certificate, cuda_launch, head_statistics
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.targets import resolve_targets
from grads_dist.table.shards import ScoreShards

CPU = torch.device("cpu")
NUM_ROWS = 30
MASK = "probed.py:forward __bool__"
"""transformers looks whether anything is masked, as it does in plain training."""
LOOK = "certificate.py:_on_host tolist"
ROWS_OF_EXPERTS = "segments.py:counts_of_sorted tolist"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> EmulatedLauncher:
    return EmulatedLauncher(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulated(launcher, monkeypatch):
    """CPU tensors go to the emulated kernels; eight rows for the first look at the LM head's bound."""
    monkeypatch.setattr(cuda_launch, "launcher_for", lambda _: launcher)
    monkeypatch.setattr(backend, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(head_statistics, "pays", lambda n, vocab, dim: True)
    monkeypatch.setattr(certificate, "FIRST_ROWS", 8)
    monkeypatch.setattr(certificate, "LARGEST_SHARE", 0.9)
    backend._choose.cache_clear()
    with forced("cuda"):
        yield
    backend._choose.cache_clear()


def waits_of(architecture: str, wanted: list[str], train: bool) -> dict[str, int]:
    """Where the host waits in the second of two micro-batches; the first checks the layers."""
    model = tiny_model(architecture).bfloat16().requires_grad_(train)
    anatomy = dissect(model)
    check_head(anatomy, CPU)
    recorder = Recorder(anatomy, resolve_targets(wanted, anatomy))
    probed = ProbedModel(anatomy, recorder, head_chunk_bytes=1 << 20)
    probed.fuse_head()
    rows = Rows.random(3)
    for _ in range(2):
        with Waits() as waits:
            batch = collate(rows, range(3), [1 / 3] * 3, CPU, anatomy.head_counts)
            with recorder.batch(batch.layout):
                total = probed(batch, record=True, feature_tokens="label")
                if train or recorder.needs_backward:
                    total.backward()
            recorder.finish(probed.head_result)
    return dict(waits.places)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("architecture", "wanted", "places"),
    [
        ("llama", ["embedding", "lm_head"], {MASK: 1, LOOK: 1}),
        ("llama", ["linear", "norms"], {MASK: 1}),
        ("gpt2", ["embedding", "lm_head", "biases"], {MASK: 1, LOOK: 1}),
        # In each of two layers for the rows of each expert, and for those of each sample, of two weights.
        ("mixtral", ["experts"], {MASK: 1, ROWS_OF_EXPERTS: 2 + 4}),
    ],
)
def test_the_host_waits_for_the_heads_bound_and_for_routers(emulated, architecture, wanted, places, train):
    assert waits_of(architecture, wanted, train) == places


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_tied_weight_waits_for_how_many_tokens_are_distinct(emulated):
    """A few times a batch, however many samples it has."""
    found = waits_of("gemma2", ["tied"], train=True)
    assert {place.split()[0] for place in found} == {
        "certificate.py:_on_host",
        "head_statistics.py:_formed",  # one sample's rows beyond the bound
        "ops.py:runs",
    }
    assert sum(count for place, count in found.items() if place.startswith("ops.py")) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("waits")
    make_model(path / "model")
    write_jsonl(path / "corpus.jsonl", make_rows(NUM_ROWS))
    return path


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_numbers_are_asked_for_when_the_next_batch_is_under_way(folder, monkeypatch, mode):
    """And, in training, when the optimizer's update is queued behind them."""
    calls: list[str] = []

    def spy(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("measure", "train_micro_batch", "update", "rehearse"):
        spy(Session, name)
    for name in ("send", "receive", "flush"):
        spy(ScoreShards, name)
    options = {"probe.mode": mode, "probe.batch_tokens": 64, "probe.features": "none"}
    prepare(["probe", *run_arguments(folder, mode, **options)])()
    while "rehearse" in calls:  # with what it calls
        del calls[: calls.index("rehearse") + 3]
    batch = ["measure", "send"] if mode == "frozen" else ["train_micro_batch", "send", "update"]
    text = " ".join(calls)
    assert " ".join([*batch, *batch, "receive"]) in text
    assert " ".join([*batch, "receive", "receive", "flush"]) in text and f"{batch[-1]} flush" not in text
    assert calls.count("send") == calls.count("receive") > 4
    table = pq.read_table(folder / mode / "scores.parquet", columns=["index"])
    assert table["index"].to_pylist() == list(range(NUM_ROWS))


def test_what_waits_is_counted():
    """Each way to ask for a value, once."""
    x = torch.tensor([0.0, 2.0, 2.0])
    ways = {
        "item": lambda: x[1].item(),
        "tolist": lambda: x.tolist(),
        "__bool__": lambda: bool(x[0] > 1),
        "nonzero": lambda: x.nonzero(),
        "index": lambda: x[x > 1],
        "bincount": lambda: torch.bincount(x.long()),
        "repeat_interleave": lambda: x.repeat_interleave(x.long()),
        "_local_scalar_dense": lambda: torch.ops.aten._local_scalar_dense(x[0]),
    }
    for name, ask in ways.items():
        with Waits() as waits:
            ask()
            x.repeat_interleave(x.long(), output_size=4)
            x[torch.tensor([0, 1])].sum()
        assert [place.split()[1] for place in waits.places] == [name] and waits.places.total() == 1
