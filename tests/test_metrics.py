"""The interval against its definition, its closed forms, and its coverage by enumeration."""

import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from robustood.metrics import Estimate, proportion

NAN = float("nan")


@st.composite
def outcomes(draw):
    """(successes, n, confidence)"""
    n = draw(st.integers(1, 400))
    return draw(st.integers(0, n)), n, draw(st.floats(0.5, 0.999))


@given(outcomes())
def test_the_ends_solve_the_defining_equations(outcome):
    k, n, confidence = outcome
    estimate, tail = proportion(k, n, confidence), (1 - confidence) / 2
    assert estimate.value == k / n and estimate.n == n
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    if k > 0:  # P(X >= k) at the lower end
        assert binom.sf(k - 1, n, estimate.low) == pytest.approx(tail, rel=1e-6)
    else:
        assert estimate.low == 0
    if k < n:  # P(X <= k) at the upper end
        assert binom.cdf(k, n, estimate.high) == pytest.approx(tail, rel=1e-6)
    else:
        assert estimate.high == 1


@given(st.integers(1, 2000), st.floats(0.5, 0.999))
def test_no_and_only_successes_have_a_closed_form(n, confidence):
    end = ((1 - confidence) / 2) ** (1 / n)
    none, all_ = proportion(0, n, confidence), proportion(n, n, confidence)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - end, abs=1e-9)
    assert (all_.value, all_.high) == (1, 1)
    assert all_.low == pytest.approx(end, abs=1e-9)


@given(outcomes())
def test_the_ends_are_quantiles_of_beta_distributions(outcome):
    k, n, confidence = outcome
    estimate, tail = proportion(k, n, confidence), (1 - confidence) / 2
    if 0 < k < n:
        assert estimate.low == pytest.approx(beta.ppf(tail, k, n - k + 1), abs=1e-9)
        assert estimate.high == pytest.approx(beta.isf(tail, k + 1, n - k), abs=1e-9)


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.95])
@pytest.mark.parametrize("n", [1, 7, 30])
def test_coverage_by_enumeration_never_falls_below_the_confidence(n, confidence):
    ends = [proportion(k, n, confidence) for k in range(n + 1)]
    low, high = np.array([(e.low, e.high) for e in ends]).T
    rates = np.concatenate(
        [[0.001, 0.03, 0.1, 0.37, 0.5, 0.8, 0.95, 0.999], np.linspace(0, 1, 101)]
    )
    for rate in rates:
        covered = (low <= rate) & (rate <= high)
        assert binom.pmf(np.arange(n + 1), n, rate)[covered].sum() >= confidence - 1e-9, rate


def test_the_interval_is_not_wider_than_it_must_be():
    """Just inside an end the tail is larger than the nominal one: a narrower interval would not do."""
    estimate = proportion(30, 100)
    assert binom.sf(29, 100, estimate.low + 1e-4) > 0.025
    assert binom.cdf(30, 100, estimate.high - 1e-4) > 0.025
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * (0.21 / 100) ** 0.5, rel=0.08)


@given(outcomes())
def test_failures_mirror_successes_and_confidence_widens(outcome):
    k, n, confidence = outcome
    one, other = proportion(k, n, confidence), proportion(n - k, n, confidence)
    assert other.low == pytest.approx(1 - one.high, abs=1e-9)
    assert other.high == pytest.approx(1 - one.low, abs=1e-9)
    wider = proportion(k, n, (1 + confidence) / 2)
    assert wider.low <= one.low and wider.high >= one.high


def test_more_data_narrow_the_interval():
    widths = [proportion(n // 4, n) for n in (8, 40, 200, 1000)]
    sizes = [e.high - e.low for e in widths]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.06


def test_an_estimate_prints_and_converts_and_cannot_change():
    estimate = proportion(95, 100)
    assert str(estimate) == f"{estimate}" == "0.950 [0.887, 0.984]"
    assert float(estimate) == 0.95
    assert estimate == Estimate(0.95, estimate.low, estimate.high, 100)
    with pytest.raises(FrozenInstanceError):
        estimate.value = 1.0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((1, 0), ("n must", "at least 1", "0")),
        ((0, -5), ("n must", "-5")),
        ((-1, 5), ("successes", "-1")),
        ((6, 5), ("successes", "at most n = 5", "6")),
        ((2.0, 5), ("successes", "2.0", "whole")),
        ((2, 5.0), ("n must", "5.0", "whole")),
        ((True, 5), ("successes", "True")),
        ((2, 5, 95), ("confidence", "95", "write 0.95")),
        ((2, 5, 1.0), ("confidence", "1.0", "write 0.95")),
        ((2, 5, 0.05), ("confidence", "0.05", "write 0.95")),
        ((2, 5, NAN), ("confidence", "nan", "write 0.95")),
        ((2, 5, "95%"), ("confidence", "'95%'", "write 0.95")),
    ],
)
def test_bad_input_is_refused_with_name_value_and_fix(untyped, arguments, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        proportion(*arguments)
    assert all(part in str(caught.value) for part in parts), caught.value
