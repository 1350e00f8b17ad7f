"""Statistics over seeds, against hand-computed values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from verl_grad_routing.compare.paired import (
    detectable,
    difference,
    estimate,
    expanded,
    holm,
    interquartile_mean,
    least_p,
    sign_flip_p,
)
from verl_grad_routing.errors import UserError


def test_interquartile_mean_cuts_a_quarter_of_the_weight_from_each_end() -> None:
    assert interquartile_mean([5.0]) == 5.0
    assert interquartile_mean([1.0, 3.0]) == 2.0  # half of each
    assert interquartile_mean([9.0, 1.0, 2.0]) == pytest.approx((0.25 * 1 + 1 * 2 + 0.25 * 9) / 1.5)
    # five seeds: weights 0, 0.75, 1, 0.75, 0; a median would say 3, a mean of whole values (2 + 3 + 7) / 3
    assert interquartile_mean([100.0, 2.0, 3.0, 7.0, -50.0]) == pytest.approx((0.75 * 2 + 3 + 0.75 * 7) / 2.5)
    assert interquartile_mean([0.0, 1.0, 2.0, 3.0, 4.0, 50.0]) == pytest.approx((0.5 * 1 + 2 + 3 + 0.5 * 4) / 3)


def test_interquartile_mean_is_scipys_trimmed_mean_where_four_divides() -> None:
    sample = np.random.default_rng(0).normal(size=(3, 12))
    np.testing.assert_allclose(interquartile_mean(sample), stats.trim_mean(sample, 0.25, axis=-1), atol=1e-14)
    np.testing.assert_allclose(interquartile_mean(sample.T, axis=0), interquartile_mean(sample), atol=1e-14)


def test_sign_flip_counts_sign_patterns() -> None:
    assert sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.4]) == pytest.approx(2 / 32)  # all of one sign: the least there is
    # sums of +-1 +-2 +-4: |sum| >= 5 for 7, 5, -5, -7: four of eight
    assert sign_flip_p([-1.0, 2.0, 4.0]) == pytest.approx(4 / 8)
    assert sign_flip_p([1.0, -1.0]) == 1.0 and sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([1.0] * 10) == pytest.approx(2 / 1024)
    for seeds in range(1, 9):
        assert sign_flip_p([1.0] * seeds) == pytest.approx(least_p(seeds))
    assert least_p(5) == 0.0625 and least_p(6) == 0.03125


def test_difference_is_paired() -> None:
    arm, base = [0.10, 0.30, 0.50, 0.70, 0.90], [0.20, 0.41, 0.59, 0.80, 1.00]
    found = difference(arm, base)
    assert found.mean == pytest.approx(-0.10) and found.seeds == 5 and found.p == pytest.approx(0.0625)
    assert -0.11 <= found.low < found.mean < found.high <= -0.09 and found.below_zero and not found.above_zero
    assert found == difference(arm, base)  # the resampling is seeded
    reordered = difference(arm, base[::-1])
    assert reordered.mean == pytest.approx(-0.10) and reordered.high - reordered.low > 0.5  # no longer the same seeds
    with pytest.raises(UserError, match="paired"):
        difference(arm, base[:4])
    with pytest.raises(UserError, match="finite"):
        difference([math.nan], [0.0])


def test_bootstrap_interval_is_that_of_all_resamples() -> None:
    """Three seeds have 27 equally likely resamples; their outer quantiles are the extremes."""
    found = difference([0.0, 0.3, 0.9], [0.0, 0.0, 0.0])
    assert (found.low, found.high) == pytest.approx((0.0, 0.9))
    five = [0.0, 0.1, 0.2, 0.3, 0.9]
    means = np.array(np.meshgrid(*[five] * 5)).reshape(5, -1).mean(axis=0)
    tail = (1 - expanded(0.95, 5)) / 2
    assert tail == pytest.approx(stats.norm.cdf(-math.sqrt(5 / 4) * 2.7764451), rel=1e-5)  # t with 4 degrees of freedom
    low, high = np.quantile(means, [tail, 1 - tail])
    found = difference(five, [0.0] * 5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.021)  # one step of the resampled means
    assert expanded(0.95, 10**6) == pytest.approx(0.95, abs=1e-5)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_up_to_five_seeds_an_interval_of_a_rate_is_their_range(seeds: int) -> None:
    """What tables and docs say of it."""
    rates = np.random.default_rng(seeds).random(seeds)
    found = estimate(rates.tolist())
    assert (found.low, found.high) == pytest.approx((rates.min(), rates.max()))


@pytest.mark.timeout(400)  # 300 bootstraps
@pytest.mark.parametrize(("seeds", "covers"), [(3, 0.75), (5, 0.92), (8, 0.94)])
def test_intervals_cover_what_so_few_seeds_allow(seeds: int, covers: float) -> None:
    draws = np.random.default_rng(0).normal(size=(300, seeds))
    found = [difference(row, np.zeros(seeds)) for row in draws]
    assert np.mean([entry.low <= 0 <= entry.high for entry in found]) == pytest.approx(covers, abs=0.045)


def test_few_seeds_state_nothing() -> None:
    assert not difference([0.0] * 4, [1.0] * 4).below_zero and difference([0.0] * 5, [1.0] * 5).below_zero
    assert not difference([1.0] * 4, [0.0] * 4).above_zero and difference([1.0] * 5, [0.0] * 5).above_zero


def test_one_seed_has_no_interval_and_claims_nothing() -> None:
    found = difference([0.1], [0.9])
    assert (found.mean, found.low, found.high, found.p) == pytest.approx((-0.8, -0.8, -0.8, 1.0))
    assert not found.below_zero and math.isnan(found.detectable) and str(found) == "-0.80"
    assert str(estimate([0.5])) == "0.50" and str(estimate([0.5, 0.5])) == "0.50 [0.50, 0.50]"


def test_saturated_rates_have_a_point_for_an_interval() -> None:
    found = difference([0.0] * 5, [1.0] * 5)
    assert (found.low, found.high) == (-1.0, -1.0) and found.below_zero and math.isnan(found.detectable)
    rounded = difference([0.1 + 0.2, 0.3], [0.0, 0.0])  # equal but for the last bit
    assert rounded.low == rounded.high and math.isnan(rounded.detectable)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.5, 0.6, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_detectable_difference_has_the_power_it_says(seeds: int) -> None:
    sample = np.linspace(-1.0, 1.0, seeds)
    noncentrality = detectable(sample) * math.sqrt(seeds) / sample.std(ddof=1)
    limit = stats.t.ppf(0.975, seeds - 1)
    power = stats.nct.sf(limit, seeds - 1, noncentrality) + stats.nct.cdf(-limit, seeds - 1, noncentrality)
    assert power == pytest.approx(0.8, abs=1e-6)
    if seeds == 5:  # the tables of paired t tests: effect 1.682 at five pairs
        assert noncentrality / math.sqrt(5) == pytest.approx(1.682, abs=1e-3)
