"""Random draws: what they depend on, what they look like, and kvpress's own with the same seed."""

from dataclasses import replace

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.policies.random_ import Random


def draws(num_tokens=130, seed=0, layer_seed=0):
    return Random(seed).score(make_llama_layer(num_tokens, layer_seed).inputs(Random(seed)))


def test_the_same_every_time():
    assert draws().equal(draws())


def test_the_state_of_the_global_generator_does_not_matter_and_stays():
    expected = draws()
    inputs = make_llama_layer(130, 0).inputs(Random())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert Random().score(inputs).equal(expected)
    assert torch.get_rng_state().equal(before)


def test_what_is_in_the_cache_does_not_matter():
    assert draws(layer_seed=0).equal(draws(layer_seed=1))


def test_how_many_other_heads_there_are_does_not_matter():
    inputs = make_llama_layer(333, 0).inputs(Random())
    one = Random().score(replace(inputs, page_table=inputs.page_table[:1]))
    assert one.equal(Random().score(inputs)[:1])


def test_seeds_and_heads_differ():
    scores = draws(num_tokens=1000)
    other_seed = draws(num_tokens=1000, seed=1)
    for one, other in [(scores[0], scores[1]), (scores[0], other_seed[0])]:
        # independent draws: 1,000 products have a standard error of 0.03
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.15


def test_every_stretch_of_the_prompt_has_the_same_chance():
    kept = draws(num_tokens=2000) > 0.5
    share = kept.float().unflatten(1, (4, 500)).mean(dim=2)
    assert (share - 0.5).abs().max() < 0.1  # standard error 0.022


@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_scores_equal_those_of_kvpress(kvpress, num_tokens, seed):
    layer = make_llama_layer(num_tokens, 0)
    theirs = kvpress.RandomPress(0.5, seed=seed).score(*layer.press_arguments())[0]
    assert Random(seed).score(layer.inputs(Random(seed))).equal(theirs)


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, None, 2**63])
def test_wrong_options_are_refused(value):
    with pytest.raises(ValueError, match=rf"random\.seed: expected a whole number from 0 to .*, got {value!r}"):
        Random(seed=value)


def test_what_it_asks_the_engine_for():
    policy = Random()
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.needs) == (0, 0, 0, frozenset())
    assert not policy.query_aware
