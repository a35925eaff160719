"""Greedy answers of two engines that should be the same, but round in another order."""

from __future__ import annotations

from dataclasses import dataclass

# By which log-probabilities may differ, and between two tokens that both engines find about equally likely: nats.
# In bfloat16, logits of 8 to 16 have neighbours 0.0625 apart.
NOISE, HALF_NOISE = 1e-3, 0.25


@dataclass(frozen=True)
class Answer:
    """tokens: of the answer; steps: of each of them, log-probabilities of the most likely tokens, by their ids"""

    tokens: list[int]
    steps: list[dict[int, float]]


def noise_of(is_float32: bool) -> float:
    """Return by how much log-probabilities may differ."""
    return NOISE if is_float32 else HALF_NOISE


def difference(found: Answer, expected: Answer, is_float32: bool) -> float:
    """Return by how much log-probabilities differ at most, up to where the answers part.

    Raises AssertionError if that is more than the noise of the dtype, or if they part where one token is clearly more
    likely than the other.
    """
    noise, worst = noise_of(is_float32), 0.0
    for place, (token, other) in enumerate(zip(found.tokens, expected.tokens, strict=True)):
        one, two = found.steps[place], expected.steps[place]
        if token != other:
            leads = [step.get(token, -float("inf")) - step.get(other, -float("inf")) for step in (one, two)]
            if not all(abs(lead) <= noise for lead in leads):
                raise AssertionError(
                    f"expected token {other} at place {place} of the answer, got {token}, which is more likely by "
                    f"{leads[0]:.3g} here and by {leads[1]:.3g} in stock vLLM"
                )
            break
        worst = max(worst, abs(one[token] - two[token]))
        if not worst <= noise:
            raise AssertionError(
                f"expected log-probabilities within {noise} of stock vLLM's, got {worst:.3g} at place {place}"
            )
    return worst
