"""The LM head's pass with the CUDA kernels: emulated on the CPU and, where there is a GPU, run on it."""

from __future__ import annotations

import copy
from collections import Counter

import head_checks as checks
import kernel_checks
import pytest
import torch
from kernel_emulator import EmulatedLauncher, missing
from test_oracle import probe
from tiny import Rows, tiny_model
from training_checks import check_training

from grads_dist.stats import backend, certificate, cuda_launch, head_statistics, operators, ops
from grads_dist.stats.head_statistics import bfloat16_terms
from grads_dist.stats.segments import Segments

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
BF16 = torch.bfloat16


class CountingLauncher(EmulatedLauncher):
    """An emulated device that knows which kernels it ran."""

    def launch(self, file, kernel, *rest) -> None:
        self.launched = getattr(self, "launched", Counter())
        self.launched[kernel] += 1
        super().launch(file, kernel, *rest)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> CountingLauncher:
    return CountingLauncher(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def launched(emulator, monkeypatch) -> Counter:
    """CPU tensors go to the emulated kernels where the cuda backend is forced; what ran."""
    monkeypatch.setattr(cuda_launch, "launcher_for", lambda _: emulator)
    monkeypatch.setattr(backend, "unavailable_reason", lambda _: None)
    backend._choose.cache_clear()
    emulator.launched = Counter()
    yield emulator.launched
    backend._choose.cache_clear()


@pytest.mark.parametrize("name", checks.CASES)
def test_equals_the_pass_in_float64(launched, name):
    checks.check_head("cpu", name)
    case = checks.CASES[name]
    transformed = case.transform != checks.LogitTransform()
    softmax = "bf16_fp32" if case.dtype == BF16 and not transformed else "fp32"
    assert {kernel for kernel in launched if "softmax" in kernel} == {f"softmax_gradient_{softmax}"}
    assert launched["column_bounds_fp32"] == bool(case.certified)
    whole = case.dtype == BF16 and not case.certified
    assert (launched["outer_product_stats_bf16"] > 0) == whole


def test_what_is_not_finite_stays_in_its_sample(launched):
    checks.check_head_nonfinite("cpu")


def test_the_host_waits_once_a_look(launched, monkeypatch):
    waits, on_host = [], certificate._on_host
    monkeypatch.setattr(certificate, "_on_host", lambda x: waits.append(len(x)) or on_host(x))
    checks.check_head("cpu", "plain")
    assert waits == [5, 5, 5]  # with the kernels, in torch, in float64


@pytest.mark.parametrize(
    ("architecture", "dtype", "rtol"),
    [("llama", torch.float32, 1e-4), ("gemma2", torch.float32, 1e-4), ("llama", BF16, 1e-2)],
)
def test_whole_models_on_the_kernels(launched, monkeypatch, architecture, dtype, rtol):
    """A pass in which every operation goes through the kernels that take it; in bfloat16 with gradients."""
    monkeypatch.setattr(head_statistics, "pays", lambda n, vocab, dim: True)
    monkeypatch.setattr(certificate, "FIRST_ROWS", 8)
    monkeypatch.setattr(certificate, "LARGEST_SHARE", 0.9)
    model, rows = tiny_model(architecture).to(dtype), Rows.random(3)
    wanted = ["embedding", "lm_head", "norms", "tied" if architecture == "gemma2" else "layers"]
    results, gradients = {}, {}
    for name in ("cuda", "reference"):
        with checks.forced(name):
            ours = copy.deepcopy(model).requires_grad_(dtype == BF16)
            results[name], targets, probed = probe(ours, rows, wanted)
        gradients[name] = [p.grad.float() for p in ours.parameters() if p.grad is not None]
        # Where gradients are wanted, torch takes the head's statistics from their products.
        assert (probed.head_result.num_certified > 0) == (dtype == torch.float32 or name == "cuda")
    softmax, outer = ("bf16_fp32", 1) if dtype == BF16 else ("fp32", 0)
    assert {f"softmax_gradient_{softmax}", "column_bounds_fp32", "join_partials"} <= set(launched)
    assert (launched["outer_product_stats_total_bf16"] > 0) == outer
    for target, numel in targets.numel.items():
        found, truth = (results[name][target] for name in ("cuda", "reference"))
        for key in ("sumsq", "min", "max"):
            torch.testing.assert_close(getattr(found, key), getattr(truth, key), rtol=rtol, atol=0)
        assert ((found.sum - truth.sum).abs() <= 0.1 * rtol * truth.norm() * numel**0.5).all()
        assert found.nonfinite.tolist() == [0, 0, 0]
    for ours, theirs in zip(gradients["cuda"], gradients["reference"], strict=True):
        assert (ours - theirs).abs().max() <= rtol * theirs.abs().max()


def test_training_on_the_kernels_is_plain_training(launched):
    """Four steps; on a GPU gpu_check makes fifty."""
    check_training("cpu", 4)
    assert launched["outer_product_stats_total_bf16"] > 0


def test_three_bfloat16_terms_are_the_float32_number():
    x = torch.randn(50, 40) * torch.logspace(-20, 3, 40)
    terms = bfloat16_terms(x)
    assert terms.shape == (150, 40) and terms.dtype == BF16
    assert torch.equal(terms.double().unflatten(0, (50, 3)).sum(1), x.double())


def test_rows_and_their_statistics_go_through_the_kernel(launched):
    """Without the repair that the other backends need."""
    x = torch.randn(7, 133)
    x[2, 5], x[3, 0], x[4:6] = torch.nan, 1e30, x[4:6] * 1e-25
    segments = Segments((3, 0, 3, 1))
    with checks.forced("reference"):
        truth, dense_truth = ops.ragged_row_stats(x, segments), ops.dense_row_stats(x)
    with checks.forced("cuda"):
        found, dense = ops.ragged_row_stats(x, segments), ops.dense_row_stats(x)
    assert launched["row_run_stats_fp32"] == 1 and launched["vector_stats_fp32"] == 1
    for ours, theirs in ((found, truth), (dense, dense_truth)):
        for key in kernel_checks.FIELDS:
            torch.testing.assert_close(
                getattr(ours, key), getattr(theirs, key), rtol=1e-5, atol=1e-4, equal_nan=True
            )
    assert found.nonfinite.tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(dense.sumsq[4:6], x[4:6].double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["reference", "cuda"])
def test_operators_keep_torchs_contract(launched, name):
    logits, targets = torch.randn(3, 21), torch.tensor([4, 0, 20])
    arguments = (logits, targets, None, None, 0, name)
    torch.library.opcheck(operators.softmax_gradient, arguments)
    lengths = [2, 0, 1]
    torch.library.opcheck(operators.column_bounds, (logits, torch.rand(3), lengths, name))
    if name == "reference":
        part = (logits[:, 5:].clone(), targets, logits.logsumexp(1), None, 5, name)
        torch.library.opcheck(operators.softmax_gradient, part)
        return
    narrow = (logits.bfloat16(), targets, None, torch.empty(3, 21), 0, name)
    torch.library.opcheck(operators.softmax_gradient, narrow)
    b, a = (kernel_checks.poisoned(3, n, BF16, "cpu").clone() for n in (9, 7))
    torch.library.opcheck(operators.outer_product_stats, (b, a, lengths, torch.zeros(9, 7), [1.0] * 3, name))
    torch.library.opcheck(operators.outer_product_stats, (b, a, lengths, None, None, name))
    torch.library.opcheck(operators.embedding_stats, (b, torch.tensor([2, 0, 2]), lengths, 4, 0))
    offsets = torch.tensor([0, 2, 2, 3])
    torch.library.opcheck(operators.row_sum_stats, (b, b + 1, None, offsets, [1, 1, 1], 1, 1e-5, name))
