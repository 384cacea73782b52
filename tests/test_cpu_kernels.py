"""The compiled CPU kernels against float64 and the reference, in every variant that this machine runs."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_dist.errors import ConfigError
from grads_dist.stats import backend, native, ops, reference
from grads_dist.stats.segments import Segments

VARIANTS = native.variants()
needs_kernels = pytest.mark.skipif(not VARIANTS, reason="the package was installed without a C++ compiler")
TYPES = (torch.float32, torch.bfloat16)
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65]


def draw(lengths, num_b, num_a, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(sum(lengths), n, generator=generator).to(dtype) for n in (num_b, num_a))
    return b, a


def truth(b, a, lengths):
    """Sum of squares, minimum and maximum in float64."""
    found = []
    for x, y in zip(b.double().split(lengths), a.double().split(lengths), strict=True):
        g = x.t() @ y
        found.append([g.square().sum(), g.min(), g.max()])
    return torch.tensor(found, dtype=torch.float64).T


def assert_as_good_as_reference(found, b, a, lengths):
    """No further from float64 than twice the reference, and a few roundings of the largest number."""
    exact = truth(b, a, lengths)
    theirs = torch.stack(reference.outer_product_stats(b, a, lengths, None, None))
    ours = torch.stack(found)
    largest = exact[1:].abs().amax(0)
    slack = torch.stack([exact[0], largest, largest]) * 8 * torch.finfo(torch.float32).eps
    assert ((ours - exact).abs() <= 2 * (theirs - exact).abs() + slack).all()


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_b", "num_a"), [(1, 1), (6, 16), (7, 17), (13, 31), (24, 64), (61, 5)])
def test_statistics_and_batch_gradient(variant, dtype, num_b, num_a):
    b, a = draw(LENGTHS, num_b, num_a, dtype)
    weights = [0.5, 2.0, -1.0, 0.0, 3.0, 1.0, 0.25, 1.5]
    total = torch.full((num_b, num_a), 0.75)
    found = native.outer_product_stats(b, a, LENGTHS, total, weights, variant)
    assert_as_good_as_reference(found, b, a, LENGTHS)
    assert_as_good_as_reference(native.outer_product_stats(b, a, LENGTHS, None, None, variant), b, a, LENGTHS)
    expected = torch.full((num_b, num_a), 0.75, dtype=torch.float64)
    parts = zip(b.double().split(LENGTHS), a.double().split(LENGTHS), weights, strict=True)
    scale = torch.zeros_like(expected)
    for x, y, w in parts:
        expected += w * (x.t() @ y)
        scale += abs(w) * (x.abs().t() @ y.abs())
    assert ((total - expected).abs() <= 16 * torch.finfo(torch.float32).eps * (scale + 1)).all()


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40) | st.integers(500, 600), min_size=1, max_size=7),
    num_b=st.integers(1, 40),
    num_a=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
)
def test_any_shape(variant, lengths, num_b, num_a, dtype):
    b, a = draw(lengths, num_b, num_a, dtype)
    found = native.outer_product_stats(b, a, lengths, None, None, variant)
    assert_as_good_as_reference(found, b, a, lengths)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_depend_on_the_sample_alone(variant):
    """Not on its neighbours, its place, the number of samples or of threads, nor on a batch gradient."""
    lengths = [5, 600, 0, 64, 129, 300, 1, 31]
    b, a = draw(lengths, 37, 53)
    together = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
    with_total = native.outer_product_stats(b, a, lengths, torch.zeros(37, 53), None, variant)
    assert torch.equal(together, torch.stack(with_total))
    parts = list(zip(b.split(lengths), a.split(lengths), lengths, strict=True))
    for i, (x, y, n) in enumerate(parts):
        alone = native.outer_product_stats(x, y, [n], None, None, variant)
        assert torch.equal(together[:, i], torch.stack(alone)[:, 0])
    order = [3, 0, 7, 1, 6, 5, 2, 4]
    x, y = (torch.cat([parts[i][k] for i in order]) for k in (0, 1))
    permuted = native.outer_product_stats(x, y, [lengths[i] for i in order], None, None, variant)
    assert torch.equal(together[:, order], torch.stack(permuted))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = native.outer_product_stats(b, a, lengths, None, None, variant)
            assert torch.equal(together, torch.stack(again))
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_scaling_by_powers_of_two_is_exact(variant, dtype):
    lengths = [17, 3]
    b, a = draw(lengths, 20, 33, dtype)
    sumsq, low, high = native.outer_product_stats(b, a, lengths, None, None, variant)
    scaled = native.outer_product_stats(b * -4, a, lengths, None, None, variant)
    assert torch.equal(scaled[0], sumsq * 16)
    assert torch.equal(scaled[1], high * -4) and torch.equal(scaled[2], low * -4)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_transposed_factors_have_the_same_extremes(variant):
    lengths = [40, 9]
    b, a = draw(lengths, 29, 35)
    one = native.outer_product_stats(b, a, lengths, None, None, variant)
    other = native.outer_product_stats(a, b, lengths, None, None, variant)
    assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
    torch.testing.assert_close(one[0], other[0], rtol=1e-7, atol=0)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_sample(variant, bad):
    lengths = [10, 20, 30]
    b, a = draw(lengths, 19, 40)
    clean = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
    a[15, 39] = bad
    found = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
    assert not found[0, 1].isfinite()
    assert torch.equal(found[:, [0, 2]], clean[:, [0, 2]])


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 7, 39])
def test_both_backends_report_the_same_of_what_is_not_finite(monkeypatch, bad, place):
    lengths = [10, 20, 30]
    b, a = draw(lengths, 19, 40)
    a[15, place] = bad
    found = {}
    for name in ("cpu", "reference"):
        monkeypatch.setenv(backend.VARIABLE, name)
        found[name] = ops.outer_product_stats(b, a, Segments(tuple(lengths)))
    assert found["cpu"].nonfinite.tolist() == found["reference"].nonfinite.tolist() == [0, 19, 0]
    for name in ("min", "max"):
        ours, theirs = (getattr(stats, name) for stats in found.values())
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_beyond_float32_are_repaired(monkeypatch, scale):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    lengths = [4, 6]
    b, a = draw(lengths, 8, 9)
    found = ops.outer_product_stats(b * scale, a, Segments(tuple(lengths)))
    expected = truth(b * scale, a, lengths)
    torch.testing.assert_close(found.sumsq, expected[0], rtol=1e-5, atol=0)


@needs_kernels
def test_rows_with_any_stride(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    b, a = draw([12], 10, 14)
    expected = ops.outer_product_stats(b, a, Segments((12,)))
    wide = torch.zeros(12, 30)
    wide[:, 3:13] = b
    for other in (wide[:, 3:13], b.t().contiguous().t()):
        found = ops.outer_product_stats(other, a, Segments((12,)))
        assert torch.equal(found.sumsq, expected.sumsq) and torch.equal(found.max, expected.max)
    one = torch.ones(1, 1).expand(12, 10)
    found = ops.outer_product_stats(one, a, Segments((12,)))
    torch.testing.assert_close(found.max, a.double().sum(0).max()[None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", *(["cpu"] if VARIANTS else [])])
def test_operator_keeps_torchs_contract(name):
    b, a = draw([3, 5], 4, 6)
    arguments = (b, a, [3, 5], torch.zeros(4, 6), [1.0, 2.0], name)
    torch.library.opcheck(ops._outer_product_stats, arguments)
    torch.library.opcheck(ops._outer_product_stats, (b, a, [3, 5], None, None, name))


@pytest.fixture
def fresh_choice():
    backend._choose.cache_clear()
    yield
    backend._choose.cache_clear()


def test_choice_is_logged_once_with_its_reason(monkeypatch, caplog, fresh_choice):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        assert backend.backend_for(cpu, torch.float64) == "reference"
        assert backend.backend_for(cpu, torch.float64) == "reference"
        assert backend.backend_for(torch.device("meta"), torch.float32) == "reference"
    assert len(caplog.messages) == 2
    assert "reference, because the CPU kernels do not read torch.float64" in caplog.messages[0]


def test_without_a_library_the_reference_runs_unless_forced_otherwise(monkeypatch, caplog, fresh_choice):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        assert backend.backend_for(torch.device("cpu"), torch.float32) == "reference"
    assert "without compiled kernels (no C++ compiler)" in caplog.text
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(ConfigError, match="'cpu' cannot run: the package was installed without"):
        backend.backend_for(torch.device("cpu"), torch.float32)


def test_an_unknown_backend_is_named(monkeypatch, fresh_choice):
    monkeypatch.setenv(backend.VARIABLE, "gpu")
    with pytest.raises(
        ConfigError, match="GRADS_DIST_BACKEND: 'gpu' is not known; allowed: auto, reference, cpu"
    ):
        backend.backend_for(torch.device("cpu"), torch.float32)
