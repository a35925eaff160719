"""The curve of a calibration, its inverse, and what fitted constants keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvevict.budgets.curve import Calibration, fit

CONSTANTS = st.floats(-50, 50)
INSIDE = st.floats(0.01, 0.99)
NLLS = st.floats(0, 12)


def quality(calibration: Calibration, fraction: float, nll: float) -> float:
    """What is left with ``fraction`` of a prompt kept, by the formula of the module."""
    bend = calibration.bend(nll)
    return fraction if abs(bend) < 1e-6 else math.expm1(fraction * bend) / math.expm1(bend)


@given(alpha=CONSTANTS, beta=CONSTANTS, target=INSIDE, nll=NLLS)
def test_the_fraction_has_the_quality_that_was_asked_for(alpha: float, beta: float, target: float, nll: float) -> None:
    calibration = Calibration(alpha=alpha, beta=beta)
    fraction = calibration.fraction(target, nll)
    assert 0 < fraction <= 1
    if abs(calibration.bend(nll)) < 30:  # beyond that a rounding of the fraction is a step of the quality
        assert quality(calibration, fraction, nll) == pytest.approx(target, abs=1e-6)


@given(alpha=CONSTANTS, beta=CONSTANTS, nll=NLLS)
def test_the_better_the_quality_that_is_asked_for_the_more_is_kept(alpha: float, beta: float, nll: float) -> None:
    calibration = Calibration(alpha=alpha, beta=beta)
    fractions = [calibration.fraction(step / 20, nll) for step in range(1, 20)]
    assert fractions == sorted(fractions)


def test_the_figures_of_the_paper_s_formula() -> None:
    steep = Calibration(alpha=0.0, beta=-8.0)
    assert steep.fraction(0.95, nll=3.0) == pytest.approx(math.log(1 + 0.95 * (math.exp(-8) - 1)) / -8)
    assert steep.fraction(0.95, nll=3.0) == pytest.approx(0.374, abs=1e-3)
    assert Calibration(alpha=0.0, beta=0.0).fraction(0.95, nll=3.0) == 0.95
    assert Calibration(alpha=1.0, beta=1.0).fraction(0.95, nll=3.0) > 0.95


MORE_SEEDS = pytest.mark.more("other made-up prompts")
FRACTIONS = [0.9, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8]


def measured(seed: int, count: int = 40) -> tuple[list[float], list[list[float]]]:
    """Prompts of which the likelihood says something, but not all."""
    rng = np.random.default_rng(seed)
    nlls = rng.uniform(1, 3, count)
    curves = [Calibration(alpha=3.0, beta=float(beta)) for beta in rng.normal(-12, 2, count)]
    return list(nlls), [[quality(curve, r, nll) for r in FRACTIONS] for curve, nll in zip(curves, nlls, strict=True)]


def quality_left(fraction: float, qualities: list[float]) -> float:
    order = np.argsort(FRACTIONS)
    return float(np.interp(fraction, [0, *np.array(FRACTIONS)[order], 1], [0, *np.array(qualities)[order], 1]))


@pytest.mark.parametrize("target", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=MORE_SEEDS) for seed in (1, 2))])
def test_fitted_budgets_leave_what_is_asked_for_and_keep_less_than_a_fixed_fraction(seed: int, target: float) -> None:
    nlls, qualities = measured(seed)
    found = fit(FRACTIONS, nlls, qualities, [target], caution=0.0)
    fractions = [found.fraction(target, nll) for nll in nlls]
    left = np.mean(list(map(quality_left, fractions, qualities)))
    assert target <= left < target + 1e-3
    fixed = next(r for r in np.linspace(0, 1, 1001) if np.mean([quality_left(r, each) for each in qualities]) >= target)
    assert np.mean(fractions) < fixed


def test_caution_and_further_targets_keep_more() -> None:
    nlls, qualities = measured(0)
    settings = [([0.9], 0.0), ([0.9], 1.0), ([0.9, 0.99], 1.0)]
    fitted = [fit(FRACTIONS, nlls, qualities, targets, caution) for targets, caution in settings]
    kept = [np.mean([found.fraction(0.9, nll) for nll in nlls]) for found in fitted]
    assert kept[0] < kept[1] < kept[2]


def test_prompts_of_one_likelihood_get_one_fraction() -> None:
    found = fit([0.5], [2.0] * 4, [[0.9]] * 4, [0.9])
    assert found.alpha == 0
    assert found.fraction(0.9, 2.0) == pytest.approx(0.5, abs=1e-3)


def test_where_nothing_is_enough_all_is_kept() -> None:
    found = fit([0.5], [1.0, 2.0, 3.0], [[0.0], [1.0], [0.0]], caution=50.0)
    assert found.fraction(0.5, 2.0) > 0.9


def test_too_few_prompts() -> None:
    with pytest.raises(ValueError, match="at least 3 measured prompts, got 2"):
        fit([0.1, 0.2], [1.0, 2.0], [[0.5, 0.6]] * 2)
