"""StreamingLLM's kept tokens against what the paper says, and against kvpress's."""

from dataclasses import replace

import pytest
import torch

from tests.llama_layer import kept_by, kept_by_press, make_llama_layer
from vllm_kvevict.policies.streaming_llm import StreamingLLM


@pytest.mark.parametrize("num_sink", [0, 1, 4, 33])
@pytest.mark.parametrize("num_kept", [40, 64, 129])
def test_keeps_the_sinks_and_the_most_recent(num_sink, num_kept):
    kept = kept_by(StreamingLLM(num_sink), make_llama_layer(130, 0), num_kept)
    expected = [*range(num_sink), *range(130 - (num_kept - num_sink), 130)]
    assert kept.tolist() == [expected, expected]


def test_scores_do_not_protect():
    """Selection does; a user who sets num_sink to 0 gets a plain window."""
    policy = StreamingLLM()
    scores = policy.score(make_llama_layer(130, 0).inputs(policy))
    assert scores.diff(dim=1).gt(0).all()


def test_scores_depend_on_positions_only():
    policy = StreamingLLM()
    one, other = (policy.score(make_llama_layer(333, seed).inputs(policy)) for seed in (0, 1))
    assert one.equal(other)


def test_positions_of_a_million_tokens_are_told_apart():
    layer = make_llama_layer(64, 0)
    inputs = replace(layer.inputs(StreamingLLM()), kv_len=1_000_003)
    assert StreamingLLM().score(inputs).diff(dim=1).eq(1).all()


@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
@pytest.mark.parametrize("num_sink", [0, 4, 16])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@torch.no_grad()
def test_keeps_what_kvpress_keeps(kvpress, num_tokens, num_sink, ratio):
    layer = make_llama_layer(num_tokens, 0)
    theirs = kept_by_press(kvpress.StreamingLLMPress(ratio, n_sink=num_sink), layer)
    assert kept_by(StreamingLLM(num_sink), layer, theirs.shape[1]).equal(theirs)


@pytest.mark.parametrize("value", [-1, 4.0, "4", True, None])
def test_wrong_options_are_refused(value):
    with pytest.raises(
        ValueError, match=rf"streaming_llm\.num_sink: expected a whole number of at least 0, got {value!r}"
    ):
        StreamingLLM(num_sink=value)


def test_what_it_asks_the_engine_for():
    policy = StreamingLLM()
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.needs) == (0, 4, 0, frozenset())
    assert StreamingLLM(num_sink=7).num_sink == 7
    assert not policy.query_aware
