"""An LM head's statistics without its gradient: equal to those of the gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from test_oracle import assert_equal, double, expected, kinds_of, probe
from tiny import Rows, five, tiny_model

from grads_dist.model.anatomy import dissect
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.batches import collate
from grads_dist.stats import certificate, head_statistics, ops
from grads_dist.stats.certificate import HeadSample, certified_statistics, pays, row_bounds
from grads_dist.stats.recorder import Recorder
from grads_dist.stats.segments import Segments
from grads_dist.stats.targets import resolve_targets

V, D, N = 3000, 64, 20


def problem(scale=2.0, dtype=torch.float32, n=N):
    """Softmax minus one-hot of a random head, hidden states, targets."""
    torch.manual_seed(0)
    hidden = torch.randn(n, D, dtype=dtype) * torch.rand(D, dtype=dtype)
    logits = scale * hidden @ torch.randn(D, V, dtype=dtype) / D**0.5
    targets = torch.distributions.Categorical(logits=logits).sample()
    targets[1] = targets[0]  # two positions that are to predict the same token
    b = logits.softmax(1)
    b[torch.arange(n), targets] -= 1
    return b, hidden, targets


def certify(b, a, targets, skipped=None):
    """Of one sample."""
    bounds = row_bounds(b, a, Segments((len(b),)), "reference")
    return certified_statistics([HeadSample(b, a, targets, skipped)], bounds)[0]


def assert_exact(found, g):
    assert found is not None
    assert found.sumsq.item() == pytest.approx(g.square().sum().item(), rel=2e-7)
    assert found.low.item() == pytest.approx(g.min().item(), rel=1e-5)
    assert found.high.item() == pytest.approx(g.max().item(), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, 8.0])
def test_equals_the_formed_gradient(scale):
    b, a, targets = problem(scale)
    before = b.clone()
    found = certify(b, a, targets)
    assert torch.equal(b, before)
    assert_exact(found, b.double().t() @ a.double())
    assert found.rows_formed < V / 4


def test_skipped_rows_have_no_part_in_it():
    """Those with the extremes, and targets, are among them."""
    b, a, targets = problem()
    before, g = b.clone(), b.double().t() @ a.double()
    extreme = torch.stack([g.amax(1).argmax(), g.amin(1).argmin()])
    skipped = torch.unique(torch.cat([targets[:4], extreme, torch.tensor([5, 9])]))
    found = certify(b, a, targets, skipped)
    assert torch.equal(b, before)
    others = torch.ones(V, dtype=torch.bool)
    others[skipped] = False
    assert_exact(found, g[others])
    assert g[others].abs().max() < g.abs().max()


def test_no_element_exceeds_its_rows_bound():
    for scale in (0.3, 4.0):
        b, a, _ = problem(scale)
        largest = (b.double().t() @ a.double()).abs().amax(1)
        assert (row_bounds(b, a, Segments((N,)), "reference")[0] >= largest).all()


def test_a_gradient_without_small_rows_is_not_certified():
    """Every row may hold the extremes: the bound says nothing."""
    b, a = torch.randn(N, V), torch.randn(N, D)
    assert certify(b, a, torch.randint(0, V, (N,))) is None


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_rows_are_formed_until_it_is_certain(monkeypatch, scale):
    monkeypatch.setattr(certificate, "FIRST_ROWS", 1)
    b, a, targets = problem(scale)
    found = certify(b, a, targets)
    assert_exact(found, b.double().t() @ a.double())
    assert found.rows_formed > 1


def test_of_rows_with_equal_bounds_none_is_passed_over(monkeypatch):
    """300 rows of one bound, more than the first look takes, and the smallest element in any of them."""
    monkeypatch.setattr(certificate, "FIRST_ROWS", 100)
    a = torch.eye(1, D)
    for place in range(0, V, 10):
        b = torch.full((1, V), 1e-3)
        b[0, ::10], b[0, 5::60] = 1.0, -0.5
        b[0, place] = -1.0
        found = certify(b, a, torch.tensor([1]))
        assert found is not None and (found.low.item(), found.high.item()) == (-1.0, 1.0), place


def test_what_is_not_finite_is_not_vouched_for():
    for bad in (torch.nan, torch.inf):
        b, a, targets = problem()
        b[3, 7] = bad
        assert certify(b, a, targets) is None
    b, a, targets = problem()
    assert certify(b, a * 1e20, targets) is None  # its Gram matrix overflows


def test_samples_of_a_chunk_are_looked_at_together(monkeypatch):
    """One wait a look, for however many samples; and what one sample gets depends on no other."""
    monkeypatch.setattr(certificate, "FIRST_ROWS", 4)
    waits, on_host = [], certificate._on_host
    monkeypatch.setattr(certificate, "_on_host", lambda x: waits.append(len(x)) or on_host(x))
    lengths = (N, 3, 0, 1, N)
    parts = zip(problem(0.3, n=N + 3), problem(8.0, n=N + 1), strict=True)
    b, a, targets = (torch.cat(pair) for pair in parts)
    b[-1, 7] = torch.nan
    pieces = list(zip(*(x.split(list(lengths)) for x in (b, a, targets)), strict=True))
    bounds = row_bounds(b, a, Segments(lengths), "reference")
    found = certified_statistics([HeadSample(*piece) for piece in pieces], bounds)
    assert waits[0] == 5 and 1 < len(waits) <= 5 and waits == sorted(waits, reverse=True)
    assert found[4] is None and len({of_sample.rows_formed for of_sample in found[:4]}) > 1
    for of_sample, piece in zip(found[:4], pieces, strict=False):
        assert vars(certify(*piece)) == vars(of_sample)


def test_it_pays_for_large_vocabularies_and_short_samples():
    assert pays(50, 32000, 4096) and pays(100, 8192, 256)
    assert not pays(50, 500, 4096) and not pays(5000, 32000, 2048) and not pays(50, 32000, 64)


@pytest.fixture
def always(monkeypatch):
    """Certify at toy size."""
    monkeypatch.setattr(head_statistics, "pays", lambda n, vocab, dim: True)
    monkeypatch.setattr(certificate, "FIRST_ROWS", 8)
    monkeypatch.setattr(certificate, "LARGEST_SHARE", 0.9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_whole_models(always, architecture, frozen):
    """Plain, tied, and soft-capped heads. In training only the tied ones need no product of their own."""
    model = tiny_model(architecture, vocab_size=301).double()
    rows = Rows.random(5, vocab=301)
    tied = architecture in ("gpt2", "gemma2")
    wanted = ["embedding", "lm_head", *(["tied"] if tied else [])]
    ours = copy.deepcopy(model).requires_grad_(not frozen)
    stats, targets, probed = probe(ours, rows, wanted)
    assert_equal(stats, targets, model, rows)
    result = probed.head_result
    counted = result.num_certified + result.num_formed_whole
    assert counted == (5 if frozen or tied else 0)
    if counted:
        assert result.num_certified > 0 and result.rows_formed >= 8 * result.num_certified


def test_head_with_a_bias(always):
    model = tiny_model("llama", vocab_size=301).double()
    model.lm_head = torch.nn.Linear(16, 301).double()
    rows = Rows.random(4, vocab=301)
    stats, targets, probed = probe(copy.deepcopy(model).requires_grad_(False), rows, ["lm_head"])
    assert_equal(stats, targets, model, rows)
    assert probed.head_result.num_certified


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_moments_alone(architecture, frozen):
    """Sums, squares and what follows from them are right, minimum and maximum unknown."""
    model = double(tiny_model(architecture))
    rows = Rows.random(6, longest=24)
    anatomy = dissect(ours := copy.deepcopy(model).requires_grad_(not frozen))
    targets = resolve_targets(kinds_of(model), anatomy)
    recorder = Recorder(anatomy, targets, extremes=False)
    probed = ProbedModel(anatomy, recorder, 1 << 20)
    probed.fuse_head()
    batch = collate(rows, range(6), [1.0] * 6, torch.device("cpu"), anatomy.head_counts)
    with recorder.batch(batch.layout):
        probed(batch, record=True).backward()
    found = recorder.finish(probed.head_result)
    assert any(len(ids) > 16 * 16 / 32 for ids in rows.ids)  # some products are formed, some are not
    for target, names in targets.members.items():
        stats = found[target]
        assert stats.min.isnan().all() and stats.max.isnan().all() and not stats.nonfinite.any()
        for i in range(6):
            gradients = expected(model, rows, i)
            truth = five([gradients[name] for name in names])
            assert stats.sumsq[i].item() == pytest.approx(truth["sumsq"], rel=1e-5, abs=1e-20), target
            # A first token attends to itself alone: the gradient of its query is rounding.
            bound = 5e-6 * max(truth["norm"], 1e-8) * targets.numel[target] ** 0.5
            assert stats.sum[i].item() == pytest.approx(truth["sum"], abs=bound), target
    assert ours is anatomy.model


def test_moments_find_what_is_not_finite_and_what_vanishes():
    segments = Segments((3, 4, 5, 0))
    b, a = torch.randn(12, 20), torch.randn(12, 30)
    b[1, 2] = torch.nan
    b[7:] *= 1e-25
    found = ops.outer_product_moments(b, a, segments)
    assert found.nonfinite.tolist() == [30, 0, 0, 0]
    parts = zip(b.double().split([3, 4, 5, 0]), a.double().split([3, 4, 5, 0]), strict=True)
    exact = torch.stack([(x.t() @ y).square().sum() for x, y in parts])
    torch.testing.assert_close(found.sumsq[1:], exact[1:], rtol=1e-5, atol=0)
