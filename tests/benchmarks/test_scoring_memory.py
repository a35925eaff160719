"""A prompt may be twice as long, or have more layers: its eviction holds what the scratch says, and little beside."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from benchmarks.serving.scoring_memory import Shape, pairs, peaks
from vllm_kvevict.policies import scratch

TOKENS, KV_HEADS = 2048, 4
OFTEN = [(policy, allocator) for policy, allocator in pairs() if policy in ("snapkv", "h2o", "keydiff")]


def peak(policy: str, allocator: str, num_layers: int, num_tokens: int) -> int:
    """With a scratch of 8 bytes by each score of a layer, as 64 MiB are for 8 KV heads and a prompt of 2^20 tokens."""
    scratch_bytes = 8 * KV_HEADS * num_tokens
    with patch.object(scratch, "_most_bytes", scratch_bytes), patch.object(scratch, "_num_held", 0):
        return max(peaks(policy, allocator, Shape(num_layers, KV_HEADS, KV_HEADS, 8), num_tokens).values())


@pytest.mark.parametrize(
    ("policy", "allocator"),
    [
        pair
        if pair in OFTEN
        else pytest.param(*pair, marks=pytest.mark.more("other policies are evicted in the same way"))
        for pair in pairs()
    ],
)
def test_the_peak_grows_with_the_prompt_as_a_few_rows_of_one_layer(policy, allocator):
    """At most as if 256 MiB were enough for the prompt of 2^20 tokens: 32 bytes by each score of a layer.

    What does not grow with the prompt is the same in both.
    """
    short, long = (peak(policy, allocator, 4, num_tokens) for num_tokens in (TOKENS, 2 * TOKENS))
    assert short < long
    assert long - short <= 32 * KV_HEADS * TOKENS


@pytest.mark.parametrize("allocator", ["uniform", "adakv", "global", "lava", "cake"])
def test_of_more_layers_a_bit_is_kept_for_each_token_and_the_pages(allocator):
    few, many = (peak("snapkv", allocator, num_layers, TOKENS) for num_layers in (4, 8))
    tokens = 4 * KV_HEADS * TOKENS
    pages = tokens // 16
    assert many - few <= tokens // 8 + 4 * pages, "scores of all layers would be 4 bytes a token"
