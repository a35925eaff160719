"""The curve of a calibration, its inverse, and that fitting finds the constants that made the points."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvevict.calibration.curve import Calibration, fit

CONSTANTS = st.floats(-50, 50)
INSIDE = st.floats(0.01, 0.99)
NLLS = st.floats(0, 12)


@given(alpha=CONSTANTS, beta=CONSTANTS, target=INSIDE, nll=NLLS)
def test_the_fraction_has_the_quality_that_was_asked_for(alpha: float, beta: float, target: float, nll: float) -> None:
    calibration = Calibration(alpha=alpha, beta=beta)
    fraction = calibration.fraction(target, nll)
    assert 0 < fraction <= 1
    if abs(calibration.bend(nll)) < 30:  # beyond that a rounding of the fraction is a step of the quality
        assert calibration.quality(fraction, nll) == pytest.approx(target, abs=1e-6)


@given(alpha=CONSTANTS, beta=CONSTANTS, nll=NLLS)
def test_the_curve_rises_from_nothing_to_all(alpha: float, beta: float, nll: float) -> None:
    calibration = Calibration(alpha=alpha, beta=beta)
    qualities = [calibration.quality(step / 20, nll) for step in range(21)]
    assert qualities == sorted(qualities)
    assert qualities[0] == 0
    assert qualities[-1] == pytest.approx(1)


def test_the_figures_of_the_paper_s_formula() -> None:
    steep = Calibration(alpha=0.0, beta=-8.0)
    assert steep.fraction(0.95, nll=3.0) == pytest.approx(math.log(1 + 0.95 * (math.exp(-8) - 1)) / -8)
    assert steep.fraction(0.95, nll=3.0) == pytest.approx(0.374, abs=1e-3)
    assert Calibration(alpha=0.0, beta=0.0).fraction(0.95, nll=3.0) == 0.95
    assert Calibration(alpha=1.0, beta=1.0).fraction(0.95, nll=3.0) > 0.95


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, -12.0), (-1.5, -1.0), (0.5, -4.0)])
def test_fitting_finds_what_made_the_points(alpha: float, beta: float) -> None:
    truth = Calibration(alpha=alpha, beta=beta)
    points = [(kept, nll, truth.quality(kept, nll)) for kept in (0.1, 0.25, 0.5) for nll in (1.0, 2.0, 3.0, 4.0)]
    found = fit(*map(list, zip(*points, strict=True)))
    assert found.alpha == pytest.approx(alpha, abs=1e-3)
    assert found.beta == pytest.approx(beta, abs=1e-3)


def test_caution_promises_less() -> None:
    """Of prompts that the likelihood cannot tell apart, half need much and half need little."""
    kept, nlls, measured = [0.25] * 8, [2.0, 3.0] * 4, [0.4, 0.4, 0.9, 0.9] * 2
    promised = [fit(kept, nlls, measured, caution=caution).quality(0.25, 2.5) for caution in (1.0, 10.0)]
    assert promised[0] == pytest.approx(0.65, abs=0.01)
    assert promised[1] < 0.5


def test_too_few_points() -> None:
    with pytest.raises(ValueError, match="at least 3 measured points, got 2"):
        fit([0.1, 0.2], [1.0, 2.0], [0.5, 0.6])
