"""Which layers one call scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_kvevict.policies.inputs import LayerWeights


def scored_at_once(
    scales: Sequence[float], weights: Sequence[LayerWeights], most: int, num_heads: Sequence[int] | None = None
) -> Iterator[tuple[int, int]]:
    """Yield bounds of stretches of layers that one call scores, in order and none longer than ``most``: they have the
    same scales, caps and positions, either all have sinks or none, and equally many query heads.

    scales:    softmax scale of each layer
    num_heads: query heads of each, or of each KV head; None: all have as many
    """
    heads = num_heads or [0] * len(scales)
    kinds = [
        (
            *(scale, of_layer.key_scale, of_layer.value_scale, of_layer.rotary and id(of_layer.rotary.cos_sin)),
            *(of_layer.softcap, of_layer.sinks is None, count),
        )
        for scale, of_layer, count in zip(scales, weights, heads, strict=True)
    ]
    first = 0
    while first < len(kinds):
        end = first + 1
        while end < min(len(kinds), first + most) and kinds[end] == kinds[first]:
            end += 1
        yield first, end
        first = end
