"""KeyDiff against the formula of the paper, dense and in float64, and against kvpress."""

from dataclasses import replace

import pytest
import torch

from tests.llama_layer import kept_by, kept_by_press, make_llama_layer
from vllm_kvevict.policies.keydiff import KeyDiff


def formula(keys):
    """- cos(k_j, mean of k / ||k||) [num_kv_heads, num_tokens] float64, one head after the other."""
    rows = []
    for head in keys.double():
        directions = [key / key.dot(key).sqrt() for key in head]
        anchor = sum(directions) / len(directions)
        rows.append([-float(direction.dot(anchor) / anchor.dot(anchor).sqrt()) for direction in directions])
    return torch.tensor(rows)


@pytest.mark.parametrize("num_tokens", [1, 130, 1024, 1025, 2050])  # tiles hold 1,024 tokens
def test_equals_the_formula(num_tokens):
    layer = make_llama_layer(num_tokens, 0)
    scores = KeyDiff().score(layer.inputs(KeyDiff()))
    # float32, another order of sums; cosines are near 0 for some tokens
    torch.testing.assert_close(scores, formula(layer.keys).float(), rtol=1e-5, atol=1e-6)


def test_a_key_unlike_the_others_stays():
    layer = make_llama_layer(130, 0)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    keys = direction + 0.01 * torch.randn_like(layer.keys)
    keys[0, 5], keys[1, 100] = -direction, -direction
    assert kept_by(KeyDiff(), replace(layer, keys=keys), 1).tolist() == [[5], [100]]


def test_lengths_of_keys_do_not_matter():
    """The anchor is a mean of directions: a long key counts as much as a short one."""
    layer = make_llama_layer(333, 0)
    stretched = replace(layer, keys=layer.keys * torch.linspace(0.1, 10, 333)[:, None])
    expected = KeyDiff().score(layer.inputs(KeyDiff()))
    torch.testing.assert_close(KeyDiff().score(stretched.inputs(KeyDiff())), expected, rtol=1e-4, atol=1e-6)


def test_rotating_the_keys_changes_nothing():
    layer = make_llama_layer(333, 0)
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    expected = KeyDiff().score(layer.inputs(KeyDiff()))
    turned = replace(layer, keys=layer.keys @ turn)
    torch.testing.assert_close(KeyDiff().score(turned.inputs(KeyDiff())), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
class TestAgainstKvpress:
    @torch.no_grad()
    def test_scores(self, kvpress, num_tokens, seed):
        layer = make_llama_layer(num_tokens, seed)
        theirs = kvpress.KeyDiffPress(0.5).score(*layer.press_arguments())[0]
        torch.testing.assert_close(KeyDiff().score(layer.inputs(KeyDiff())), theirs, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
    @torch.no_grad()
    def test_kept_tokens(self, kvpress, num_tokens, seed, ratio):
        layer = make_llama_layer(num_tokens, seed)
        theirs = kept_by_press(kvpress.KeyDiffPress(ratio), layer)
        assert kept_by(KeyDiff(), layer, theirs.shape[1]).equal(theirs)


def test_it_takes_no_options():
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        KeyDiff(window=32)


def test_what_it_asks_the_engine_for():
    policy = KeyDiff()
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.needs) == (0, 0, 0, frozenset())
    assert not policy.query_aware
