"""The parts of the score against numbers worked out by hand, loops and scipy."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import gaussian_kde as scipy_kde
from scipy.stats import norm as normal
from selection_tables import TARGETS, clustered_features, score_table, with_column

from grads_dist.errors import ConfigError, DataError
from grads_dist.selection import criteria
from grads_dist.selection import density as density_module
from grads_dist.selection import joint_density as joint_module
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.criteria import GradientCriterion, gradient_criterion
from grads_dist.selection.density import density, gaussian_kde, improved_sheather_jones, silverman
from grads_dist.selection.diversity import diversity
from grads_dist.selection.joint_density import gaussian_kde_2d, joint_density
from grads_dist.selection.near_duplicates import NearDuplicates
from grads_dist.selection.noise import uniform
from grads_dist.selection.ranks import distinct, positions, r, ranking, z
from grads_dist.selection.redundancy import redundancy
from grads_dist.selection.score import combine
from grads_dist.selection.signal import compute_signal
from grads_dist.selection.smooth import remove_trend
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import Neighbours, knn
from grads_dist.similarity.points import unit_rows

FEW_VALUES = arrays(np.float64, st.integers(1, 30), elements=st.sampled_from([-2.0, 0.0, 0.5, 3.0]))
NO_ADJUSTMENT = {"length_adjust": False}


# ---- ranks


@settings(max_examples=50, deadline=None)
@given(FEW_VALUES)
def test_z_and_r_equal_loops(x):
    ranks = [((x < v).sum() + 1 + (x <= v).sum()) / 2 / len(x) for v in x]
    np.testing.assert_allclose(r(x), ranks if len(x) > 1 else [0.5], rtol=1e-12)
    spread = np.sqrt(np.mean((x - x.mean()) ** 2))
    np.testing.assert_allclose(z(x), (x - x.mean()) / spread if np.ptp(x) else np.zeros(len(x)), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(-5, 5), st.integers(-(10**12), 10**12)), max_size=20))
def test_distinct_equals_numpy(values):
    x = np.array(values, np.int64)
    expected = np.unique(x, return_inverse=True, return_counts=True)
    for ours, theirs in zip(distinct(x), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_z_of_a_constant_is_zero_whatever_the_rounding():
    assert z(np.full(7, 0.1)).tolist() == [0.0] * 7
    assert z(np.array([0.1, 0.1 * (1 + 1e-16), 0.1])).tolist() == [0.0] * 3
    assert len(z(np.zeros(0))) == len(r(np.zeros(0))) == 0


def test_ranking_breaks_ties_by_row():
    score = np.array([1.0, 3.0, 1.0, 3.0, -0.0, 0.0])
    assert ranking(score).tolist() == [1, 3, 0, 2, 4, 5]
    assert positions(score).tolist() == [2, 0, 3, 1, 4, 5]


def test_noise_is_uniform_independent_and_belongs_to_the_row():
    index = np.arange(20000)
    u = uniform(index, 0, "a")
    assert 0 < u.min() and u.max() < 1
    quantiles = np.quantile(u, np.linspace(0.05, 0.95, 19))
    np.testing.assert_allclose(quantiles, np.linspace(0.05, 0.95, 19), atol=0.015)
    for other in (uniform(index, 1, "a"), uniform(index, 0, "b"), np.roll(u, 1)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    np.testing.assert_array_equal(uniform(index[5:9], 0, "a"), u[5:9])


# ---- signal


def hand_table():
    columns = {
        "embedding.max": [1.0, np.e, np.e**2],
        "embedding.min": [-1.0, -1.0, -np.e],
        "embedding.std": [1.0, 1.0, 1.0],
        "embedding.mean": [0.0, 0.0, 3.0],
        "embedding.sum": [0.0, 0.0, 30.0],
        "embedding.sumsq": [1.0, 1.0, 100.0],
        "embedding.norm": [1.0, 1.0, np.e**3],
        "num_label_tokens": [1, 2, 3],
    }
    return pa.table(columns)


def test_paper_signal_of_hand_computed_numbers():
    signal = compute_signal(hand_table(), SelectionConfig(**NO_ADJUSTMENT), ["embedding"])
    z_max = np.array([-1.0, 0.0, 1.0]) * np.sqrt(3 / 2)
    z_rising_last = np.array([-1.0, -1.0, 2.0]) / np.sqrt(2)
    np.testing.assert_allclose(signal.values, (z_max + z_rising_last + 0 + z_rising_last) / 4, atol=1e-12)
    assert signal.zero_means == [] and signal.floored == {} and signal.length_r2 is None


def test_paper_signal_leaves_out_a_mean_that_is_rounding():
    table = with_column(hand_table(), "embedding.sum", [1e-7, -1e-6, 1e-6])
    signal = compute_signal(table, SelectionConfig(**NO_ADJUSTMENT), ["embedding"])
    z_max = np.array([-1.0, 0.0, 1.0]) * np.sqrt(3 / 2)
    z_min = np.array([-1.0, -1.0, 2.0]) / np.sqrt(2)
    np.testing.assert_allclose(signal.values, (z_max + z_min) / 3, atol=1e-12)
    assert signal.zero_means == ["embedding"]


def test_every_target_has_the_same_say():
    table = score_table(200)
    config = SelectionConfig(**NO_ADJUSTMENT)
    both = compute_signal(table, config, TARGETS)
    alone = [compute_signal(table, config, [target]).values for target in TARGETS]
    np.testing.assert_allclose(both.values, np.mean(alone, axis=0), atol=1e-12)
    assert both.zero_means == ["lm_head"]


def test_norm_and_columns_as_signal():
    table = hand_table()
    expected = np.array([-1.0, -1.0, 2.0]) / np.sqrt(2)
    by_norm = compute_signal(table, SelectionConfig(signal="norm", **NO_ADJUSTMENT), ["embedding"])
    np.testing.assert_allclose(by_norm.values, expected, atol=1e-12)
    columns = ["embedding.mean", "num_label_tokens"]
    by_columns = compute_signal(table, SelectionConfig(signal=columns, **NO_ADJUSTMENT), [])
    rising = np.array([-1.0, 0.0, 1.0]) * np.sqrt(3 / 2)
    np.testing.assert_allclose(by_columns.values, (expected + rising) / 2, atol=1e-12)


def test_zeros_are_floored_at_the_smallest_positive_value_and_counted(caplog):
    table = with_column(hand_table(), "embedding.norm", [0.0, 2.0, 5.0])
    floored = compute_signal(table, SelectionConfig(signal="norm", **NO_ADJUSTMENT), ["embedding"])
    table = with_column(hand_table(), "embedding.norm", [2.0, 2.0, 5.0])
    plain = compute_signal(table, SelectionConfig(signal="norm", **NO_ADJUSTMENT), ["embedding"])
    np.testing.assert_array_equal(floored.values, plain.values)
    assert floored.floored == {"embedding.norm": 1} and plain.floored == {}
    assert "embedding.norm" in caplog.text


def test_a_column_without_a_positive_value_says_nothing():
    table = with_column(hand_table(), "embedding.norm", [0.0, 0.0, 0.0])
    signal = compute_signal(table, SelectionConfig(signal="norm", **NO_ADJUSTMENT), ["embedding"])
    assert signal.values.tolist() == [0.0] * 3 and signal.floored == {"embedding.norm": 3}


@pytest.mark.parametrize(
    ("signal", "targets", "error", "words"),
    [
        (["loss"], [], ConfigError, "selection.signal: 'loss' is not a column"),
        (["id"], [], ConfigError, "column 'id' holds string"),
        ("paper", [], ConfigError, "needs at least one target"),
        ("norm", ["layers.0"], ConfigError, "'layers.0.norm' is not a column"),
        (["bad"], [], DataError, "'bad' of the score table is not finite in 1 rows"),
    ],
)
def test_signal_refuses(signal, targets, error, words):
    table = hand_table().append_column("id", pa.array(["a", "b", "c"]))
    table = table.append_column("bad", pa.array([1.0, np.nan, 2.0]))
    with pytest.raises(error, match=words):
        compute_signal(table, SelectionConfig(signal=signal), targets)


# ---- length and trend


def test_length_adjustment_removes_a_planted_trend():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2000, 4000)
    x = np.log(lengths)
    noise = rng.normal(0, 0.3, 4000)
    signal = 0.2 * x**2 - 1.5 * np.maximum(x - 5, 0) + noise
    adjusted = remove_trend(signal, lengths, log=True)
    np.testing.assert_allclose(adjusted.residual[lengths > 9], noise[lengths > 9], atol=0.15)
    assert abs(np.corrcoef(adjusted.residual, x)[0, 1]) < 1e-10
    expected = 1 - np.var(noise) / np.var(signal)
    assert adjusted.r2 == pytest.approx(expected, abs=0.01)
    assert adjusted.residual.mean() == pytest.approx(0, abs=1e-12)


def test_the_fit_on_means_is_the_fit_on_rows():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 4, 60)
    signal = rng.normal(size=60)
    adjusted = remove_trend(signal, lengths, log=True)
    group_means = np.array([signal[lengths == length].mean() for length in lengths])
    np.testing.assert_allclose(adjusted.residual, signal - group_means, atol=1e-10)


@pytest.mark.parametrize("lengths", [np.full(50, 7), np.arange(1, 10), np.array([3])])
def test_one_length_or_few_rows_only_lose_their_mean(lengths):
    signal = np.random.default_rng(2).normal(size=len(lengths))
    adjusted = remove_trend(signal, lengths, log=True)
    np.testing.assert_allclose(adjusted.residual, signal - signal.mean(), atol=1e-12)
    assert adjusted.r2 == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num_lengths", [2, 3, 4, 5, 6, 50])
def test_a_signal_that_is_length_alone_leaves_nothing(num_lengths):
    lengths = np.tile(np.arange(1, num_lengths + 1), 40)
    adjusted = remove_trend(2 + 3 * np.log(lengths), lengths, log=True)
    assert (adjusted.residual == 0).all() and adjusted.r2 == 1.0


def test_a_few_very_long_rows_do_not_bend_the_fit():
    rng = np.random.default_rng(3)
    lengths = np.concatenate([rng.integers(10, 100, 3000), [10**6] * 2])
    signal = rng.normal(0, 0.1, 3002)
    signal[-2:] = [3.0, -3.0]
    adjusted = remove_trend(signal, lengths, log=True)
    np.testing.assert_allclose(adjusted.residual[:-2], signal[:-2], atol=0.05)


def test_detrend_removes_the_drift_over_steps(caplog):
    rng = np.random.default_rng(4)
    table = score_table(2000)
    steps = table.column("step").to_numpy()
    own = rng.normal(0, 1, 2000)
    table = table.append_column("x", pa.array(own + 0.5 * steps))
    config = SelectionConfig(signal=["x"], detrend=True, length_adjust=False)
    signal = compute_signal(table, config, [])
    assert abs(np.corrcoef(signal.values, steps)[0, 1]) < 1e-10
    assert np.corrcoef(signal.values, own)[0, 1] > 0.99
    assert signal.step_r2 == pytest.approx(0.89, abs=0.03)
    frozen = with_column(table, "step", np.full(2000, -1))
    untouched = compute_signal(frozen, config, [])
    np.testing.assert_allclose(untouched.values, untouched.raw, atol=1e-12)
    assert untouched.step_r2 == pytest.approx(0, abs=1e-12) and "nothing to remove" in caplog.text


# ---- density


def test_kde_equals_scipy():
    rng = np.random.default_rng(0)
    signal = np.concatenate([rng.normal(size=1500), rng.normal(4, 0.3, size=450), rng.normal(0, 20, size=50)])
    for bandwidth in (0.05, silverman(signal), 1.0):
        exact = scipy_kde(signal, bw_method=bandwidth / signal.std(ddof=1))(signal)
        np.testing.assert_allclose(gaussian_kde(signal, bandwidth), exact, rtol=1e-3)


def uncorrelated(x):
    """The rows of x rotated so that their sample covariance is diagonal, with spreads 3 and 0.2."""
    directions = np.linalg.svd(x - x.mean(axis=1, keepdims=True), full_matrices=False)[2]
    return directions * np.array([[3.0], [0.2]]) * np.sqrt(x.shape[1])


def test_kde_of_two_signals_equals_scipy():
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=(2, 1500)), rng.normal(4, 0.3, (2, 450)), rng.normal(0, 8, (2, 50))]
    for sample, factor in ((rng.normal(size=(2, 2000)), 0.28), (np.concatenate(parts, axis=1), 1.0)):
        pair = uncorrelated(sample)
        exact = scipy_kde(pair, bw_method=factor)(pair)
        found = gaussian_kde_2d(pair, factor * pair.std(axis=1, ddof=1))
        np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_a_coarse_grid_of_two_signals_is_still_near(monkeypatch, caplog):
    monkeypatch.setattr(joint_module, "_MAX_SIDE", 256)
    monkeypatch.setattr(joint_module, "_BLOCK_ROWS", 300)
    pair = uncorrelated(np.random.default_rng(2).normal(size=(2, 2000)))
    exact = scipy_kde(pair, bw_method=0.28)(pair)
    bandwidths = 0.28 * pair.std(axis=1, ddof=1)
    np.testing.assert_allclose(gaussian_kde_2d(pair, bandwidths), exact, rtol=0.02)
    assert "coarser" in caplog.text


def test_density_over_targets_is_over_both_and_one_that_is_constant_does_not_count():
    rng = np.random.default_rng(3)
    pair = rng.normal(size=(2, 500)) * np.array([[1.0], [40.0]])
    both = joint_density(pair, "silverman")
    assert both.bandwidth == silverman(pair[0], 2) and both.second_bandwidth == silverman(pair[1], 2)
    center = np.argmin((pair**2 / np.array([[1.0], [1600.0]])).sum(axis=0))
    assert both.values[center] > np.quantile(both.values, 0.9)
    pair[1] = 7.0
    alone = joint_density(pair, "isj")
    np.testing.assert_array_equal(alone.values, density(pair[0], "isj").values)
    assert (alone.rule, alone.second_bandwidth) == ("isj", 0.0)
    assert joint_density(np.ones((2, 3)), "silverman").values.tolist() == [1.0] * 3


@pytest.mark.parametrize("preset", ["paper", "norm"])
def test_the_signals_of_the_targets_add_up_and_rank_by_their_density(preset):
    table = score_table(400)
    config = SelectionConfig(signal=preset, density_over="targets", gradient="density")
    signal = compute_signal(table, config, TARGETS)
    np.testing.assert_allclose(signal.pair.mean(axis=0), signal.values, atol=1e-12)
    for target, values in zip(TARGETS, signal.pair, strict=True):
        np.testing.assert_allclose(
            values, compute_signal(table, config_of(preset), [target]).values, atol=1e-12
        )
    found = gradient_criterion(signal.values, np.arange(400), config, signal.pair)
    np.testing.assert_array_equal(found.values, r(joint_density(signal.pair, "silverman").values))
    assert (found.values != criterion_of(signal.values, gradient="density").values).any()


def config_of(preset):
    return SelectionConfig(signal=preset)


@pytest.mark.parametrize(
    ("signal", "targets", "words"),
    [
        ("paper", ["embedding"], "needs two targets, and the score table has 1; allowed: signal"),
        ("norm", ["embedding", "lm_head", "tied"], "needs two targets, and the score table has 3"),
        (["loss", "el2n"], TARGETS, "needs a signal of targets, and selection.signal lists columns"),
    ],
)
def test_density_over_targets_needs_exactly_two(signal, targets, words):
    table = score_table(30, targets=["embedding", "lm_head", "tied"])
    config = SelectionConfig(signal=signal, density_over="targets")
    with pytest.raises(ConfigError, match=f"selection.density_over: targets {words}") as caught:
        compute_signal(table, config, targets)
    assert "\n" not in str(caught.value)


def test_silverman_of_a_known_sample():
    signal = normal.ppf((np.arange(1000) + 0.5) / 1000)
    assert silverman(signal) == pytest.approx((4 / 3 / 1000) ** 0.2, rel=0.01)
    assert silverman(np.array([0.0, 0, 0, 0, 0, 0, 1])) == pytest.approx(np.sqrt(1 / 7) * (21 / 4) ** -0.2)


def test_a_quartile_range_of_rounding_is_none(caplog):
    rng = np.random.default_rng(0)
    tied = np.where(rng.random(2000) < 0.9, 0.0, 5 + rng.normal(size=2000))
    nearly = np.where(tied == 0, rng.random(2000) * 1e-17, tied)
    np.testing.assert_allclose(density(nearly, "silverman").values, density(tied, "silverman").values)
    pair = np.stack([nearly, rng.normal(size=2000)])
    expected = joint_density(np.stack([tied, pair[1]]), "silverman").values
    np.testing.assert_allclose(joint_density(pair, "silverman").values, expected)
    assert not caplog.records


def test_isj_follows_the_narrow_mode_and_the_unit():
    rng = np.random.default_rng(5)
    normal_sample = rng.normal(size=10000)
    assert improved_sheather_jones(normal_sample) == pytest.approx(0.168, rel=0.1)
    modes = np.concatenate([rng.normal(0, 0.1, 1000), rng.normal(9, 0.1, 1000)])
    assert improved_sheather_jones(modes) == pytest.approx(0.1 * 0.9 * 1000**-0.2, rel=0.35)
    for scale in (1e-3, 1e3):
        scaled = improved_sheather_jones(normal_sample * scale)
        assert scaled == pytest.approx(scale * improved_sheather_jones(normal_sample), rel=1e-6)


def test_isj_falls_back_to_silverman_on_ties(caplog):
    signal = np.tile([0.0, 1.0, 2.0], 100)
    estimate = density(signal, "isj")
    assert estimate.rule == "silverman" and estimate.bandwidth == silverman(signal)
    assert "isj" in caplog.text
    assert density(np.random.default_rng(0).normal(size=500), "isj").rule == "isj"


@pytest.mark.parametrize("n", [1, 2, 5])
def test_density_of_a_constant_is_one(n):
    estimate = density(np.full(n, 0.3), "isj")
    assert estimate.values.tolist() == [1.0] * n
    assert (estimate.bandwidth, estimate.rule) == (0.0, "constant")


def test_density_of_two_rows_and_of_an_outlier_is_positive(caplog, monkeypatch):
    pair = density(np.array([0.0, 1.0]), "silverman")
    assert pair.values[0] == pytest.approx(pair.values[1]) and pair.values[0] > 0
    monkeypatch.setattr(density_module, "_MAX_GRID", 1 << 12)
    signal = np.append(np.random.default_rng(0).normal(size=999), 1e6)
    estimate = density(signal, "silverman")
    assert estimate.values.min() == estimate.values[-1] > 0
    assert "coarser" in caplog.text


# ---- gradient criterion


def criterion_of(signal, **options):
    return gradient_criterion(signal, np.arange(len(signal)), SelectionConfig(**options))


def test_equal_products_of_ranks_are_ties():
    p, signal = np.array([1.0, 2, 3, 4, 5, 6]), np.array([6.0, 3, 2, 4, 5, 1])
    values = criteria._from_density(signal, p, np.arange(6), SelectionConfig())
    assert len(set(values[[0, 1, 2, 5]])) == 1


def test_every_variant_of_the_gradient_criterion():
    signal = np.random.default_rng(6).gamma(2.0, size=400)
    p = density(signal, "silverman").values
    expected = {
        "density": r(p),
        "magnitude": r(signal),
        "density_magnitude": r(np.round(r(p) * r(signal), 12)),
        "rare": 1 - r(p),
        "band": [float(np.quantile(signal, 0.25) <= v <= np.quantile(signal, 0.75)) for v in signal],
        "zscore": [float(abs(v - signal.mean()) <= 2 * signal.std()) for v in signal],
    }
    for name, values in expected.items():
        found = criterion_of(signal, gradient=name)
        np.testing.assert_allclose(found.values, values, atol=1e-12, err_msg=name)
        assert found.eligible.all() == (name != "zscore")
        assert (found.density is None) == (name in ("magnitude", "band", "zscore"))
    outside = ~criterion_of(signal, gradient="zscore").eligible
    assert outside.sum() == (np.abs(z(signal)) > 2).sum() > 0


def test_band_takes_the_share_it_names():
    signal = np.random.default_rng(7).normal(size=1000)
    found = criterion_of(signal, gradient="band", band=[0.4, 0.9]).values
    assert found.sum() == pytest.approx(500, abs=2)
    assert signal[found == 1].min() == pytest.approx(np.quantile(signal, 0.4), abs=0.02)


def test_flatten_spreads_evenly_over_the_signal():
    signal = np.random.default_rng(8).normal(size=40000)
    central = signal[np.abs(signal) < 1.5]
    chosen = ranking(criterion_of(central, gradient="flatten").values)[:2000]
    counts = np.histogram(central[chosen], bins=5, range=(-1.5, 1.5))[0]
    before = np.histogram(central, bins=5, range=(-1.5, 1.5))[0]
    assert counts.min() / counts.max() > 0.75 > 0.5 > before.min() / before.max()


def test_flatten_depends_on_seed_and_row_alone():
    signal = np.random.default_rng(9).normal(size=50)
    one, same = (criterion_of(signal, gradient="flatten", seed=1).values for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert (one != criterion_of(signal, gradient="flatten", seed=2).values).any()


@pytest.mark.parametrize(
    "name", ["density", "magnitude", "density_magnitude", "flatten", "rare", "band", "zscore"]
)
@pytest.mark.parametrize("n", [1, 6])
def test_a_constant_signal_prefers_no_row(name, n):
    values = criterion_of(np.full(n, 0.7), gradient=name).values
    assert np.isfinite(values).all() and (0 <= values).all() and (values <= 1).all()
    if name != "flatten":
        assert len(set(values)) == 1


# ---- diversity, redundancy, score


def loop_terms(features, gradient, k):
    """D's mean distance, R and the shadow by loops over exact cosines; identical rows are neighbours."""
    n = len(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = np.round(unit @ unit.T, 6)
    lists = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: -cosine[i, j])[:k] for i in range(n)]
    distance = [np.mean([1 - cosine[i, j] for j in lists[i]]) for i in range(n)]
    tau = np.median([cosine[i, lists[i][-1]] for i in range(n)])
    reduction, shadow = np.zeros(n), np.full(n, -1)
    for i in range(n):
        near = [j for j in range(n) if j != i and (features[j] == features[[i, *lists[i]]]).all(axis=1).any()]
        before = [j for j in near if (-gradient[j], j) < (-gradient[i], i)]
        if before:
            best = min(before, key=lambda j: (-cosine[i, j], -gradient[j], j))
            reduction[i] = max(0, (cosine[i, best] - tau) / (1 - tau))
            shadow[i] = best if reduction[i] > 0 else -1
    return np.array(distance), reduction, shadow, tau


@pytest.mark.parametrize(("n", "k", "copies"), [(150, 10, 0), (150, 5, 12), (20, 30, 4)])
def test_diversity_and_redundancy_equal_loops(n, k, copies):
    features = clustered_features(n, seed=k)
    features[3 : 3 + copies] = features[3]
    gradient = np.random.default_rng(k).integers(0, 12, n) / 12
    graph = knn(unit_rows(features), SimilarityConfig(k=k, library="torch", device="cpu"))
    distance, reduction, shadow, tau = loop_terms(features, gradient, k)
    found = redundancy(graph, gradient)
    assert found.tau == pytest.approx(tau, abs=2e-6)
    np.testing.assert_allclose(found.values, reduction, atol=2e-5)
    clear = np.abs(reduction) > 1e-4
    np.testing.assert_array_equal(found.shadow[clear], shadow[clear])
    assert clear.sum() > n // 10
    ours = diversity(graph)
    apart = np.abs(distance[:, None] - distance[None]) > 5e-6
    np.testing.assert_array_equal(
        (ours[:, None] > ours[None])[apart], (distance[:, None] > distance[None])[apart]
    )
    np.testing.assert_allclose(ours, r(np.round(distance, 5)), atol=0.05)


def test_redundancy_does_not_depend_on_blocks(monkeypatch):
    features, gradient = clustered_features(100), np.random.default_rng(0).random(100)
    graph = knn(unit_rows(features), SimilarityConfig(library="torch", device="cpu"))
    whole = redundancy(graph, gradient)
    monkeypatch.setattr("grads_dist.selection.redundancy._BLOCK_ROWS", 7)
    parts = redundancy(graph, gradient)
    np.testing.assert_array_equal(whole.values, parts.values)
    np.testing.assert_array_equal(whole.shadow, parts.shadow)


def test_only_the_best_of_a_large_group_of_copies_is_not_redundant():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(90, 6)).astype(np.float16)
    features[20:70] = features[20]
    gradient = rng.random(90)
    gradient[60] = 1.0
    found = redundancy(
        knn(unit_rows(features), SimilarityConfig(k=10, library="torch", device="cpu")), gradient
    )
    others = [i for i in range(20, 70) if i != 60]
    assert (found.values[others] == 1.0).all() and (found.shadow[others] == 60).all()
    assert found.values[60] == 0 and found.shadow[60] == -1


def test_redundancy_where_every_cosine_is_one():
    two_points = np.repeat(np.eye(2, dtype=np.float16), 5, axis=0)
    identical = knn(unit_rows(two_points), SimilarityConfig(k=2, library="torch", device="cpu"))
    found = redundancy(identical, np.array([0.1, 0.5, 0.5, 0.2, 0.3] * 2))
    assert found.tau == 1.0
    assert found.values.tolist() == [1, 0, 1, 1, 1] * 2
    assert found.shadow.tolist() == [1, -1, 1, 1, 1, 6, -1, 6, 6, 6]
    ids = np.array([[1], [0], [0]])
    graph = Neighbours(ids, np.array([[1.0], [1.0], [0.9]], np.float32), np.arange(3))
    at_one = redundancy(graph, np.array([3.0, 2.0, 1.0]))
    assert at_one.tau == 1.0
    assert at_one.values.tolist() == [0, 1, 0] and at_one.shadow.tolist() == [-1, 0, -1]


def test_rows_equal_to_the_mean_neither_shadow_nor_are_shadowed():
    features = np.concatenate([np.zeros((3, 2)), np.eye(2), -np.eye(2)]).astype(np.float32)
    graph = knn(unit_rows(features), SimilarityConfig(k=2, library="torch", device="cpu"))
    found = redundancy(graph, np.array([0.9, 0.8, 0.7, 0.4, 0.3, 0.2, 0.1]))
    assert (found.values[:3] == 0).all() and not np.isin(found.shadow, [0, 1, 2]).any()
    kept = NearDuplicates(graph, unit_rows(features), 0.5).drop(np.arange(7.0), np.ones(7, bool)).kept
    assert kept.all()


def test_a_row_without_neighbours_is_at_distance_one():
    ids = np.array([[1, 2], [0, 2], [0, 1], [-1, -1]])
    cosine = np.array([[0.9, 0.5], [0.9, -0.5], [0.5, -0.5], [np.nan, np.nan]], np.float32)
    graph = Neighbours(ids, cosine, np.arange(4))
    np.testing.assert_allclose(diversity(graph), [1 / 4, 2 / 4, 3.5 / 4, 3.5 / 4])
    found = redundancy(graph, np.arange(4.0))
    assert found.tau == pytest.approx(-0.5) and found.values[3] == 0


def test_score_adds_the_terms_and_a_weight_of_zero_drops_one():
    features, gradient = clustered_features(80), np.random.default_rng(2).random(80)
    criterion = GradientCriterion(gradient, np.ones(80, bool), None)
    graph = knn(unit_rows(features), SimilarityConfig(library="torch", device="cpu"))
    terms = combine(criterion, graph, Weights(2.0, 0.25, 3.0))
    expected = 2 * gradient + 0.25 * diversity(graph) - 3 * redundancy(graph, gradient).values
    np.testing.assert_allclose(terms.score, expected, atol=1e-12)
    np.testing.assert_allclose(combine(criterion, graph, Weights(1, 0, 0)).score, gradient, atol=1e-12)
    np.testing.assert_allclose(
        combine(criterion, graph, Weights(0, 1, 0)).score, diversity(graph), atol=1e-12
    )
    bare = combine(criterion, None, Weights(1, 0, 0))
    np.testing.assert_array_equal(bare.score, gradient)
    assert np.isnan(bare.diversity).all() and np.isnan(bare.redundancy).all() and bare.tau is None
