"""Which layers one call scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_kvevict.policies.inputs import LayerWeights


def scored_at_once(scales: Sequence[float], weights: Sequence[LayerWeights], most: int) -> Iterator[tuple[int, int]]:
    """Yield bounds of stretches of layers that one call scores, in order and none longer than ``most``: they have the
    same scales, caps and positions, and either all have sinks or none.

    scales: softmax scale of each layer
    """
    kinds = [
        (
            *(scale, of_layer.key_scale, of_layer.value_scale, of_layer.rotary and id(of_layer.rotary.cos_sin)),
            *(of_layer.softcap, of_layer.sinks is None),
        )
        for scale, of_layer in zip(scales, weights, strict=True)
    ]
    first = 0
    while first < len(kinds):
        end = first + 1
        while end < min(len(kinds), first + most) and kinds[end] == kinds[first]:
            end += 1
        yield first, end
        first = end
