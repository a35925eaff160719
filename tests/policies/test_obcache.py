"""OBCache against dense float64 formulas, the derivatives they come from, and the changes that they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.policies import Need
from vllm_kvevict.policies.obcache import OBCacheJoint, OBCacheKey, OBCacheValue
from vllm_kvevict.policies.snapkv import SnapKV
from vllm_kvevict.policies.vatp import Vatp

KINDS = [OBCacheValue, OBCacheKey, OBCacheJoint]
LENGTHS = [17, 130, 333, 1100]  # the last one takes two tiles

# Squares of float32 probabilities and logits: a logit of a few tens is off by some 1e-6, which the exponential makes
# relative and the square doubles.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-9}
# |v - o|^2 is made of |v|^2, |o|^2 and v o: where v is close to o, what is left of them is as exact as they are.
CANCELLATION = 4 * torch.finfo(torch.float32).eps


def attention_of_the_window(layer, window):
    """A, Z [num_heads, window, num_tokens] and o [num_heads, window, head_size] float64, one head after the other."""
    group = layer.query.shape[1] // len(layer.keys)
    hidden = torch.ones(window, layer.num_tokens, dtype=torch.bool).triu(layer.num_tokens - window + 1)
    parts = []
    for head in range(layer.query.shape[1]):
        keys, values = layer.keys[head // group].double(), layer.values[head // group].double()
        logits = layer.query[-window:, head].double() @ keys.T * layer.module.scaling
        attention = logits.masked_fill(hidden, float("-inf")).softmax(1)
        parts.append((attention, logits, attention @ values))
    return [torch.stack(part) for part in zip(*parts, strict=True)]


def changes(kind, attention, logits, values, output):
    """[window, num_tokens, head_size]: what happens to each query's output, as the paper has it."""
    by_value = attention[..., None] * values
    by_key = (attention * logits)[..., None] * (values - output[:, None])
    return {OBCacheValue: by_value, OBCacheKey: by_key, OBCacheJoint: by_value + by_key}[kind]


def dense(policy, layer):
    """Two [num_kv_heads, num_tokens - window] float64: the scores before pooling, and what the summands cancel from."""
    before, group = layer.num_tokens - policy.window, layer.query.shape[1] // len(layer.keys)
    attention, logits, output = attention_of_the_window(layer, policy.window)
    scores, sizes = [], []
    for kv_head, values in enumerate(layer.values[:, :before].double()):
        parts = [part[kv_head * group : (kv_head + 1) * group] for part in (attention, logits, output)]
        if policy.group == "pre":
            parts = [part.mean(0, keepdim=True) for part in parts]
        by_head, sizes_by_head = [], []
        for a, z, o in zip(parts[0][..., :before], parts[1][..., :before], parts[2], strict=True):
            by_head.append(changes(type(policy), a, z, values, o).square().sum((0, 2)))
            lengths = values.norm(dim=1) + o.norm(dim=1)[:, None]
            sizes_by_head.append((a * (1 + z.abs()) * lengths).square().sum(0))
        reduce = {"mean": torch.mean, "max": torch.amax}.get(policy.group, torch.sum)
        scores.append(reduce(torch.stack(by_head), dim=0))
        sizes.append(reduce(torch.stack(sizes_by_head), dim=0))
    return torch.stack(scores), torch.stack(sizes)


def assert_scores(policy, layer, expected, sizes):
    allowed = TOLERANCE["atol"] + TOLERANCE["rtol"] * expected
    if Need.OUTPUTS in policy.needs:
        allowed = allowed + CANCELLATION * sizes
    error = (scores_of(policy, layer) - expected).abs() / allowed
    assert (error <= 1).all(), (
        f"{float(error.max())} times what is allowed, at {divmod(int(error.argmax()), error.shape[1])}"
    )


def pooled(scores, pool, width):
    """Slide a centred window of ``width`` tokens over a row; past its edges there is nothing."""
    half = width // 2
    around = [scores[max(token - half, 0) : token + half + 1] for token in range(len(scores))]
    return torch.stack([one.amax() if pool == "max" else one.sum() / width for one in around])


def scores_of(policy, layer):
    scores = policy.score(layer.inputs(policy))
    assert scores[:, -policy.window :].amin() >= scores[:, : -policy.window].amax()
    return scores[:, : -policy.window]


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("group", ["sum", "mean", "max", "pre"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_the_formula(kind, group, num_tokens):
    layer, policy = make_llama_layer(num_tokens, 0), kind(group=group, pool_kernel=1)
    assert_scores(policy, layer, *dense(policy, layer))


@pytest.mark.parametrize("pool, pool_kernel, window", [("max", 7, 16), ("avg", 5, 64)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pools_and_windows(kind, pool, pool_kernel, window):
    layer, policy = make_llama_layer(333, 1), kind(window=window, pool=pool, pool_kernel=pool_kernel)
    scores, sizes = dense(policy, layer)
    expected = torch.stack([pooled(row, pool, pool_kernel) for row in scores])
    assert_scores(policy, layer, expected, torch.stack([pooled(row, "max", pool_kernel) for row in sizes]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_is_the_squared_derivative_of_the_output(kind):
    """Forward-mode derivatives of attention itself, in the direction in which a key, a value or both go to zero."""
    layer, policy = make_llama_layer(60, 2), kind(pool_kernel=1)
    group, before = layer.query.shape[1] // len(layer.keys), 60 - 16
    hidden = torch.ones(16, 60, dtype=torch.bool).triu(before + 1)
    move_keys, move_values = kind is not OBCacheValue, kind is not OBCacheKey
    scores = torch.zeros(len(layer.keys), before, dtype=torch.float64)
    for head in range(layer.query.shape[1]):
        query = layer.query[-16:, head].double()

        def attend(keys, values, query=query):
            logits = query @ keys.T * layer.module.scaling
            return logits.masked_fill(hidden, float("-inf")).softmax(1) @ values

        keys, values = layer.keys[head // group].double(), layer.values[head // group].double()
        for token in range(before):
            only = torch.zeros(60, 1, dtype=torch.float64)
            only[token] = -1
            direction = (only * keys * move_keys, only * values * move_values)
            scores[head // group, token] += torch.func.jvp(attend, (keys, values), direction)[1].square().sum()
    assert_scores(policy, layer, scores, dense(policy, layer)[1])


@pytest.mark.parametrize("sharp", [1, 1000])
@torch.no_grad()
def test_value_score_is_the_exact_change_of_the_output(sharp):
    """Also with one-hot attention, which a scale of a thousand makes."""
    layer = make_llama_layer(100, 0)
    layer = replace(layer, query=layer.query * sharp)
    attention, _, before = attention_of_the_window(layer, 16)
    if sharp > 1:
        assert ((attention > 0.999) | (attention < 0.001)).double().mean() > 0.99
    expected = torch.zeros(2, 84, dtype=torch.float64)
    for token in range(84):
        values = layer.values.clone()
        values[:, token] = 0
        _, _, after = attention_of_the_window(replace(layer, values=values), 16)
        expected[:, token] = (after - before).square().unflatten(0, (2, -1)).sum((1, 2, 3))
    torch.testing.assert_close(scores_of(OBCacheValue(pool_kernel=1), layer), expected.float(), **TOLERANCE)


def shifted(layer, constant):
    """The same layer, with a constant added to every logit of a window query."""
    query, keys = layer.query.clone(), layer.keys.clone()
    query[:, :, -1] = 1
    keys[:, :, -1] += constant / layer.module.scaling
    return replace(layer, query=query, keys=keys)


@pytest.mark.parametrize("policy", [OBCacheValue(), SnapKV(), Vatp()], ids=lambda policy: policy.name)
@torch.no_grad()
def test_what_is_made_of_attention_does_not_notice_a_shift_of_all_logits(policy):
    layer = make_llama_layer(200, 0)
    plain, moved = scores_of(policy, shifted(layer, 0)), scores_of(policy, shifted(layer, 3))
    torch.testing.assert_close(moved, plain, **TOLERANCE)


@pytest.mark.parametrize("kind", [OBCacheKey, OBCacheJoint])
@torch.no_grad()
def test_what_is_made_of_logits_does(kind):
    layer, policy = make_llama_layer(200, 0), kind(pool_kernel=1)
    plain, moved = scores_of(policy, shifted(layer, 0)), scores_of(policy, shifted(layer, 3))
    assert ((moved / plain - 1).abs() > 0.1).float().mean() > 0.9
    assert_scores(policy, shifted(layer, 3), *dense(policy, shifted(layer, 3)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rounding_makes_no_score_negative(kind):
    """Where one token has all the attention, its value is the output, and what its key adds to it is rounding alone."""
    for seed in range(6):
        layer = make_llama_layer(100, seed)
        keys, query = layer.keys.clone(), layer.query.clone()
        query[:, :, -1] = 5
        keys[:, 50, -1] = 200 / layer.module.scaling / 5
        layer = replace(layer, query=query, keys=keys)
        assert (attention_of_the_window(layer, 16)[0][:, :, 50] > 1 - 1e-9).all()
        scores = scores_of(kind(pool_kernel=1), layer)
        assert (scores >= 0).all()
        if kind is not OBCacheKey:
            assert (scores[:, 50] > 1).all()


def test_what_they_ask_the_engine_for():
    for kind in KINDS:
        policy = kind()
        assert (policy.query_window, policy.num_sink, policy.num_recent, policy.query_aware) == (16, 0, 16, True)
    assert not OBCacheValue().needs
    assert OBCacheKey().needs == OBCacheJoint().needs == {Need.OUTPUTS}


@pytest.mark.parametrize("kind", [OBCacheKey, OBCacheJoint])
def test_missing_outputs_are_named(kind):
    inputs = replace(make_llama_layer(100, 0).inputs(kind()), output=None)
    with pytest.raises(ValueError, match=rf"{kind.name}: expected the attention outputs of the last queries, got none"):
        kind().score(inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, r"\.window: expected a whole number of at least 1, got 0"),
        ({"window": 16.0}, r"\.window: expected a whole number of at least 1, got 16\.0"),
        ({"pool_kernel": 4}, r"\.pool_kernel: expected an odd number of at least 1, got 4"),
        ({"pool": "min"}, r"\.pool: expected 'max' or 'avg', got 'min'"),
        ({"group": "post"}, r"\.group: expected 'sum', 'mean', 'max' or 'pre', got 'post'"),
    ],
)
def test_wrong_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=kind.name + message):
        kind(**options)
