"""Intervals that hold: formulas against NumPy and textbooks, and no interval that collapses where the data do."""

import math

import numpy as np
import pytest

from blockem_tl.evaluation.statistics import (
    Estimate,
    Rate,
    agreement,
    average_rate,
    clustered_rate,
    mean_over_domains,
    minimal_detectable_effect,
    paired_difference,
    paired_p_value,
    paired_reduction,
    share_removed,
)

BEFORE = [[True] * 12 + [False] * 17, [True] * 10 + [False] * 19, [True] * 14 + [False] * 15]
AFTER = [[True] * 3 + [False] * 26, [True] * 2 + [False] * 27, [True] * 1 + [False] * 28]


def test_point_estimates_are_plain_means() -> None:
    first, second = np.mean(BEFORE), np.mean(AFTER)
    assert paired_difference(BEFORE, AFTER).value == pytest.approx(second - first)
    assert paired_reduction(BEFORE, AFTER).value == pytest.approx((first - second) / first)
    assert clustered_rate(BEFORE).value == pytest.approx(first)


def test_the_bootstrap_is_the_formula() -> None:
    draw = np.random.default_rng(7)
    prompts, seeds = draw.gamma(1.0, size=(500, 29)), draw.dirichlet(np.ones(3), size=500)
    extra = draw.gamma(0.25, size=(4, 500))
    values = []
    for r in range(500):
        total = prompts[r].sum() + extra[:, r].sum()
        start = (seeds[r] @ np.array(BEFORE, float) @ prompts[r] + extra[0, r] + extra[1, r]) / total
        end = (seeds[r] @ np.array(AFTER, float) @ prompts[r] + extra[0, r] + extra[2, r]) / total
        values.append(end - start)
    found = paired_difference(BEFORE, AFTER, resamples=500, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert (found.n, found.seeds) == (29, 3) and found == paired_difference(BEFORE, AFTER, resamples=500, seed=7)


def test_seeds_that_differ_widen_the_interval() -> None:
    alike = [[True] * 10 + [False] * 19] * 3
    unlike = [[True] * 1 + [False] * 28, [True] * 10 + [False] * 19, [True] * 19 + [False] * 10]
    widths = [found.high - found.low for found in (clustered_rate(alike), clustered_rate(unlike))]
    assert widths[1] > 1.2 * widths[0]


def test_intervals_do_not_collapse_at_zero() -> None:
    before, none = [True] * 10 + [False] * 19, [False] * 29
    assert paired_reduction(before, none).value == 1.0 and 0.7 < paired_reduction(before, none).low < 0.99
    same = paired_difference(before, before)
    assert same.low < 0 < same.high and same.value == 0
    assert math.isnan(paired_reduction(none, before).value) and math.isnan(paired_reduction(none, before).low)


def test_rates_print_their_n_and_interval() -> None:
    assert str(paired_difference(BEFORE, AFTER)).endswith("(n = 29, 3 seeds)") and "[" in str(clustered_rate(BEFORE[0]))
    assert str(Estimate(value=0.5, low=0.25, high=0.75, n=8)) == "50.0 % [25.0, 75.0] (n = 8)"


@pytest.mark.parametrize("k", [0, 3, 29])
def test_the_average_of_equal_judges_is_wilsons_interval(k: int) -> None:
    rate = Rate(k=k, n=29)
    found = average_rate([rate, rate])
    assert (found.value, found.low, found.high) == pytest.approx((rate.value, *rate.interval), abs=1e-9)
    assert average_rate([Rate(k=0, n=10), Rate(k=10, n=10)]).value == 0.5
    with pytest.raises(ValueError, match="at least one rate"):
        average_rate([])


def test_paired_p_value_is_the_sign_test() -> None:
    before, after = [True] * 9 + [False] * 20, [False] * 8 + [True] + [True] + [False] * 19
    assert paired_p_value(before, after) == pytest.approx(2 * (math.comb(9, 0) + math.comb(9, 1)) / 2**9)
    assert paired_p_value(before, before) == 1.0


def test_kappa_is_the_textbook_example() -> None:
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = agreement(first, second)
    assert found.value == pytest.approx(0.4) and found.low < 0.4 < found.high and found.n == 50
    assert agreement(["1"] * 3, ["1"] * 3).value == 1.0 and agreement(["1", "5"] * 9, ["5", "1"] * 9).value == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="equally long"):
        agreement(["1"], [])


def test_mean_and_sem_over_domains() -> None:
    estimate, sem = mean_over_domains([0.9, 0.95, 0.97, 0.9, 0.96, 0.91])
    assert estimate.value == pytest.approx(0.93166667) and sem == pytest.approx(np.std([0.9, 0.95, 0.97, 0.9, 0.96, 0.91], ddof=1) / 6**0.5)
    assert estimate.n == 6 and estimate.low == pytest.approx(estimate.value - 2.570582 * sem, abs=1e-6)
    with pytest.raises(ValueError, match="at least two domains"):
        mean_over_domains([0.5])


def test_minimal_detectable_effect_shrinks_with_prompts_and_pairing() -> None:
    found = minimal_detectable_effect(100, 0.4)
    h = 2 * math.asin(math.sqrt(0.4)) - 2 * math.asin(math.sqrt(0.4 - found))
    assert h * math.sqrt(100 / 2) == pytest.approx(1.959964 + 0.841621, abs=1e-3)  # Cohen's h
    assert minimal_detectable_effect(400, 0.4) < found > minimal_detectable_effect(100, 0.4, correlation=0.5)
    assert math.isnan(minimal_detectable_effect(5, 0.1))  # five prompts cannot show a fall from 10 %
    with pytest.raises(ValueError, match="0 < rate <= 1"):
        minimal_detectable_effect(29, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [], "non-empty"),
        ([True], [True, False], "equally long"),
        ([[True], [False]], [[True, False], [True, True]], "same seeds and prompts"),
        ([[True, False], [False]], [[True], [False, False]], "unequal lengths"),
    ],
)
def test_unpaired_flags_are_refused(before, after, message) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(before, after)


def test_the_share_removed_and_its_interval() -> None:
    draw = np.random.default_rng(0)
    base, tuned = draw.normal(size=60), draw.normal(size=60) + 2
    arm = 0.5 * (base + tuned)
    found = share_removed(base, tuned, arm)
    assert found.value == pytest.approx(0.5) and found.low == pytest.approx(0.5) and found.high == pytest.approx(0.5)
    noisy = share_removed(base, tuned, arm + draw.normal(size=60))
    assert noisy.low < noisy.value < noisy.high and noisy.low < 0.5 < noisy.high and noisy.n == 60
    assert share_removed(base, tuned, tuned).value == 0 and share_removed(base, tuned, base).value == 1
    seeds = share_removed([base, base], [tuned, tuned], [arm, base])
    assert seeds.value == pytest.approx(0.75) and (seeds.n, seeds.seeds) == (60, 2)


def test_a_share_of_what_did_not_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="moved up, its mean moved by -1"):
        share_removed([1.0, 2.0], [0.0, 1.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="expected equal shapes"):
        share_removed([1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 0.0])
