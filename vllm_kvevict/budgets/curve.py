"""Context-calibrated compression: how much of a prompt must stay, told by how well the model predicts the prompt.

Compactor (Chari and Van Durme 2025, arXiv:2507.08143). What a fraction ``r`` of a prompt is worth is modelled as

    quality(r) = (exp(r b) - 1) / (exp(b) - 1),    b = alpha * nll + beta

where ``nll`` is the mean negative log-likelihood of its own tokens, and quality is the log-likelihood of the answer
with all of the prompt over the one with what is kept, 1 where nothing is lost. The further ``b`` is below 0 the more
can go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from pydantic import BaseModel, ConfigDict

# below it the curve is a straight line, and its formula 0 / 0
_STRAIGHT = 1e-6
# beyond it exp overflows; the curve has long been a right angle
_STEEPEST = 500.0


class Calibration(BaseModel):
    """The two constants of one policy on one model.

    alpha: per nat
    beta:  of a prompt that the model could predict word by word
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float
    beta: float

    def bend(self, nll: float) -> float:
        """Return ``b`` of a prompt; nll: mean negative log-likelihood of its tokens, nats."""
        return min(max(self.alpha * nll + self.beta, -_STEEPEST), _STEEPEST)

    def fraction(self, target: float, nll: float) -> float:
        """Return the smallest fraction of a prompt in (0, 1] whose quality is ``target``, in (0, 1)."""
        return float(_fraction(target, np.array(self.bend(nll))))


def fit(
    fractions: Sequence[float],
    nlls: Sequence[float],
    qualities: Sequence[Sequence[float]],
    targets: Sequence[float] = (0.8, 0.9, 0.95),
    caution: float = 0.25,
) -> Calibration:
    """Return the constants that keep least of the measured prompts and leave the quality that is asked for.

    Not those that describe all of the curves best, as the paper has it: where a curve is fitted at fractions that no
    target asks for, it promises too little or too much at those that one does. What a prompt would have at a fraction
    that was not measured is interpolated.

    fractions: kept of each prompt, in any order
    nlls:      [num_prompts] mean negative log-likelihood of each prompt, nats per token
    qualities: [num_prompts][num_fractions] measured, as in the module's docstring
    targets:   each of them is met by the mean over the prompts
    caution:   by how many standard errors of that mean, for the sake of prompts that were not measured. The default is
               what served best where one half of SmolLM2's prompts was fitted and the other half answered

    Raises ValueError if there are fewer than three prompts.
    """
    if len(nlls) < 3:
        raise ValueError(f"calibration: expected at least 3 measured prompts, got {len(nlls)}")
    curves = _Curves.of(fractions, qualities)
    signal = np.array(nlls)
    # around their middle, so that alpha turns the line and does not lift it
    centred, spread = signal - signal.mean(), float(signal.std())
    slopes = np.linspace(-5, 5, 101) / spread if spread > 0 else np.zeros(1)
    best, least = Calibration(alpha=0.0, beta=_STEEPEST), math.inf
    for slope in slopes:
        level = _lowest_level(curves, slope * centred, targets, caution)
        kept = float(np.mean([_fraction(target, slope * centred + level).mean() for target in targets]))
        if kept < least:
            best, least = Calibration(alpha=float(slope), beta=float(level - slope * signal.mean())), kept
    return best


@dataclass(frozen=True)
class _Curves:
    """Quality over the fraction kept, a line through measured points for each prompt.

    fractions: [num_points] ascending, from 0 to 1
    qualities: [num_prompts, num_points]
    """

    fractions: np.ndarray
    qualities: np.ndarray

    @classmethod
    def of(cls, fractions: Sequence[float], qualities: Sequence[Sequence[float]]) -> _Curves:
        order = np.argsort(fractions)
        return cls(
            np.pad(np.array(fractions)[order], 1, constant_values=(0, 1)),
            np.pad(np.array(qualities)[:, order], ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1))),
        )

    def meet(self, bends: np.ndarray, targets: Sequence[float], caution: float) -> bool:
        """Return whether budgets by these bends, one for each prompt, leave the quality that each target asks for."""
        for target in targets:
            left = np.array(list(map(np.interp, _fraction(target, bends), repeat(self.fractions), self.qualities)))
            if left.mean() - caution * left.std(ddof=1) / math.sqrt(len(left)) < target:
                return False
        return True


def _lowest_level(curves: _Curves, bends: np.ndarray, targets: Sequence[float], caution: float) -> float:
    """Return what must be added to all bends to meet the targets; ``_STEEPEST``, which keeps all, if nothing does."""
    low, high = -_STEEPEST, _STEEPEST
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if curves.meet(bends + middle, targets, caution) else (middle, high)
    return high


def _fraction(target: float, bend: np.ndarray) -> np.ndarray:
    """Return the fractions whose quality is ``target`` on curves of these bends."""
    bend = np.clip(bend, -_STEEPEST, _STEEPEST)
    is_straight = np.abs(bend) < _STRAIGHT
    bend = np.where(is_straight, 1.0, bend)
    return np.where(is_straight, target, np.log1p(target * np.expm1(bend)) / bend)
