"""Runs on a pretended device what is to run on a GPU: `device_worker.py FOLDER` writes FOLDER/results.json.

A process of its own, because a device has to be there before the first backward pass.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pretend_gpu
import pyarrow.parquet as pq
import torch
from head_checks import forced
from kernel_emulator import EmulatedLauncher, missing
from library_cases import batch_of
from score_tables import faults_between, numels, read_scores
from tiny import ARCHITECTURES, Rows, tiny_model
from workspace import make_model, make_rows, run_arguments, write_jsonl

import grads_dist
from grads_dist.commands import prepare
from grads_dist.model.anatomy import check_head, dissect
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.batches import collate
from grads_dist.runtime import ranks
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.rundir import RunDir
from grads_dist.similarity.torch_search import searcher
from grads_dist.stats import backend, certificate, cuda_launch, head_statistics
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import resolve_targets

CPU = torch.device("cpu")
NUM_ROWS = 5
TARGETS = {
    "mixtral": ["embedding", "lm_head", "layers", "experts"],
    "gpt2": ["embedding", "lm_head", "tied", "layers", "biases"],
    "gemma2": ["embedding", "lm_head", "tied", "layers"],
}
BOUND = 32 * float(np.finfo(np.float32).eps)
"""Attention and sums may be computed by other code than on the CPU; norms are of order 1."""


@contextmanager
def on_kernels(folder: Path) -> Iterator[None]:
    """The cuda backend, with its kernels emulated."""
    launcher = EmulatedLauncher(folder)
    with mock.patch.multiple(certificate, FIRST_ROWS=8, LARGEST_SHARE=0.9), forced("cuda"):
        with mock.patch.object(cuda_launch, "launcher_for", lambda _: launcher):
            with mock.patch.object(backend, "unavailable_reason", lambda _: None):
                with mock.patch.object(head_statistics, "pays", lambda n, vocab, dim: True):
                    backend._choose.cache_clear()
                    yield
                    backend._choose.cache_clear()


def statistics_on(device: torch.device, architecture: str, train: bool, dtype: torch.dtype) -> dict:
    """All numbers of a micro-batch, on the host; with weights that train also their gradients."""
    model = tiny_model(architecture).to(dtype).to(device)
    model.config._attn_implementation = "eager"
    if model.config.tie_word_embeddings:
        model.tie_weights()  # what has moved here are other tensors
    anatomy = dissect(model.requires_grad_(train))
    check_head(anatomy, device)
    targets = resolve_targets(TARGETS.get(architecture, ["embedding", "lm_head", "layers"]), anatomy)
    recorder = Recorder(anatomy, targets)
    probed = ProbedModel(anatomy, recorder, head_chunk_bytes=1 << 20)
    probed.fuse_head()
    batch = collate(Rows.random(NUM_ROWS), range(NUM_ROWS), [0.2] * NUM_ROWS, device, anatomy.head_counts)
    with recorder.batch(batch.layout):
        probed(batch, record=True, feature_tokens="label").backward()
    found = {name: on_host(stats) for name, stats in recorder.finish(probed.head_result).items()}
    found["features"] = probed.features.cpu()
    found["losses"] = probed.head_result.losses.cpu()
    for name, parameter in model.named_parameters() if train else ():
        found[f"gradient of {name}"] = parameter.grad.cpu()
    return found


def on_host(stats: Statistics) -> torch.Tensor:
    """[4, S]; without the sum, which for an LM head is zero but for rounding."""
    return torch.stack([getattr(stats, name).double().cpu() for name in ("sumsq", "min", "max", "nonfinite")])


def compare_models(
    device: torch.device, architecture: str, train: bool, dtype: torch.dtype, rtol: float
) -> None:
    """The same numbers as on the CPU."""
    truth, found = (statistics_on(where, architecture, train, dtype) for where in (CPU, device))
    assert found.keys() == truth.keys() and len(found) > 4
    for name, expected in truth.items():
        assert type(found[name]) is torch.Tensor, name
        torch.testing.assert_close(found[name], expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def compare_runs(device: torch.device, folder: Path) -> None:
    """A whole frozen run, with both kinds of features and a selection, on the device and on the CPU."""
    make_model(folder / "model")
    write_jsonl(folder / "corpus.jsonl", make_rows(40))
    options = {"probe.mode": "frozen", "probe.features": ["content", "gradient"]}
    for name, where in (("device", device), ("cpu", CPU)):
        with mock.patch.object(ranks, "_own_device", lambda _, where=where: where):
            prepare(["run", *run_arguments(folder, name, **options)])()
            ranks.Ranks.start(detect()).close()
    tables = [read_scores(folder / name) for name in ("device", "cpu")]
    assert not faults_between(*tables, numels(folder / "cpu"), BOUND)
    for kind in ("content", "gradient"):
        paths = [RunDir(folder / name).features(kind) for name in ("device", "cpu")]
        found, truth = (np.load(path, allow_pickle=False).astype(np.float32) for path in paths)
        np.testing.assert_allclose(found, truth, rtol=2.0**-9, atol=2.0**-10)
    picked = [folder / name / "selection" / "default" / "selected.parquet" for name in ("device", "cpu")]
    found, truth = (pq.read_table(path)["index"].to_pylist() for path in picked)
    assert found == truth
    environment = json.loads((folder / "device" / "environment.json").read_text())
    assert environment["device"].startswith(pretend_gpu.NAME)


def compare_recordings(device: torch.device) -> None:
    """`record` around a pass of one's own."""
    norms = []
    for where in (CPU, device):
        model = tiny_model("llama").to(where)
        inputs = {name: x.to(where) for name, x in batch_of(Rows.random(NUM_ROWS)).items()}
        with grads_dist.record(model, ["embedding", "lm_head", "layers"]) as recording:
            model(**inputs).loss.backward()
        found = recording.statistics()
        norms.append({name: stats.norm().cpu() for name, stats in found.items()})
    for name, expected in norms[0].items():
        torch.testing.assert_close(norms[1][name], expected, rtol=BOUND, atol=0)


def compare_searches(device: torch.device) -> None:
    """The blocked search of neighbours."""
    units = torch.nn.functional.normalize(torch.randn(700, 16, generator=torch.Generator().manual_seed(0)))
    results = [searcher(units.numpy(), str(where))(units[:600].numpy(), 5) for where in (CPU, device)]
    for found, truth in zip(*results, strict=True):
        np.testing.assert_array_equal(found, truth)


def check_refusals(device: torch.device) -> None:
    """Tensors of host and device do not mix, and values are read by a copy."""
    x, rows = torch.ones(3, 2, device=device), torch.tensor([0, 2])
    assert x.index_select(0, rows.to(device)).cpu().tolist() == [[1.0, 1.0]] * 2
    for mix in (
        lambda: x.index_select(0, rows),
        lambda: x + torch.ones(2),
        lambda: x[rows],
    ):
        try:
            mix()
        except RuntimeError as error:
            assert "of the host among" in str(error)
        else:
            raise AssertionError("was not refused")
    try:
        x.numpy()
    except TypeError:
        return
    raise AssertionError("was read")


def cases(device: torch.device, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything, by name."""
    for architecture in ARCHITECTURES:
        for train in (False, True):

            def run(architecture: str = architecture, train: bool = train) -> None:
                with forced("reference"):
                    compare_models(device, architecture, train, torch.float32, BOUND)

            yield f"{architecture}, {'trained' if train else 'frozen'}", run
    for architecture, dtype in (
        ("llama", torch.bfloat16),
        ("gemma2", torch.float32),
        ("mixtral", torch.bfloat16),
    ):

        def run_kernels(architecture: str = architecture, dtype: torch.dtype = dtype) -> None:
            with on_kernels(folder):
                compare_models(device, architecture, True, dtype, 1e-5 if dtype == torch.float32 else 2.0**-6)

        if missing() is None:
            yield f"{architecture} on the kernels", run_kernels
    yield "what a GPU refuses", lambda: check_refusals(device)
    yield "a whole run", lambda: compare_runs(device, folder)
    yield "record", lambda: compare_recordings(device)
    yield "search", lambda: compare_searches(device)


def main() -> None:
    """Run all cases; each one's result is null or what it raised."""
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as temporary, pretend_gpu.pretending() as device:
        for name, run in cases(device, Path(temporary)):
            try:
                run()
                results[name] = None
            except Exception:  # noqa: BLE001 -- of whatever kind: the test shows it
                results[name] = traceback.format_exc()
    (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
