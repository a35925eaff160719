"""Context-calibrated compression: how much of a prompt must stay, told by how well the model predicts the prompt.

Compactor (Chari and Van Durme 2025, arXiv:2507.08143). What a fraction ``r`` of a prompt is worth is modelled as

    quality(r) = (exp(r b) - 1) / (exp(b) - 1),    b = alpha * nll + beta

where ``nll`` is the mean negative log-likelihood of its own tokens, and quality is the log-likelihood of the answer
with all of the prompt over the one with what is kept, 1 where nothing is lost. The further ``b`` is below 0 the more
can go.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
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

    def quality(self, fraction: float, nll: float) -> float:
        """Return the quality in [0, 1] that is left with ``fraction`` of a prompt kept."""
        bend = self.bend(nll)
        return fraction if abs(bend) < _STRAIGHT else math.expm1(fraction * bend) / math.expm1(bend)

    def fraction(self, target: float, nll: float) -> float:
        """Return the smallest fraction of a prompt in (0, 1] whose quality is ``target``, in (0, 1)."""
        bend = self.bend(nll)
        return target if abs(bend) < _STRAIGHT else math.log1p(target * math.expm1(bend)) / bend


def fit(fractions: list[float], nlls: list[float], qualities: list[float], caution: float = 1.5) -> Calibration:
    """Return the constants that describe what was measured best, by least squares.

    fractions: kept of each prompt
    nlls:      mean negative log-likelihood of each prompt, nats per token
    qualities: measured, as in the module's docstring
    caution:   how much more it weighs to promise too high a quality, and so to keep too little, than too low a one

    Raises ValueError if there are fewer than three points.
    """
    if len(fractions) < 3:
        raise ValueError(f"calibration: expected at least 3 measured points, got {len(fractions)}")
    kept, signal, measured = (torch.tensor(values, dtype=torch.float64) for values in (fractions, nlls, qualities))

    def loss(constants: torch.Tensor) -> torch.Tensor:
        bend = (constants[0] * signal + constants[1]).clamp(-_STEEPEST, _STEEPEST)
        bend = torch.where(bend.abs() < _STRAIGHT, _STRAIGHT, bend)
        errors = torch.expm1(kept * bend) / torch.expm1(bend) - measured
        return (errors.square() * torch.where(errors > 0, caution, 1.0)).mean()

    # the loss has several valleys: the best of a few descents
    starts = [(alpha, beta) for alpha in (-2.0, 0.0, 2.0) for beta in (-10.0, -2.0, 1.0)]
    found = [_descend(loss, torch.tensor(start, dtype=torch.float64)) for start in starts]
    alpha, beta = min(found, key=lambda constants: float(loss(constants))).tolist()
    return Calibration(alpha=alpha, beta=beta)


def _descend(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """Return where a descent by L-BFGS ends."""
    constants = start.requires_grad_()
    optimizer = torch.optim.LBFGS([constants], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(constants)
        value.backward()
        return value

    optimizer.step(closure)
    return constants.detach()
