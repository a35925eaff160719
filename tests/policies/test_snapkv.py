"""SnapKV against the paper's formula, dense and in float64, and against kvpress's own implementation."""

from dataclasses import replace

import pytest
import torch

from tests.compactions import kv_lens_of
from tests.llama_layer import make_llama_layer
from tests.paged import LAYOUTS, PACKINGS, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.policies import ScoreInputs
from vllm_kvevict.policies.inputs import LayerWeights
from vllm_kvevict.policies.snapkv import SnapKV

BLOCK_SIZE, HEAD_SIZE = 32, 16
UNSCALED = LayerWeights()

# Scores are means of float32 probabilities; a logit of a few units is off by some 1e-6, which its exponential makes
# relative. Scores near 0 have no smaller terms to cancel, so the relative bound holds for all of them.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-8}


def dense_attention(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention [num_heads, window, kv_len] float64 of the last queries [window, num_heads, head_size]."""
    window, num_heads, _ = query.shape
    num_kv_heads, kv_len, _ = keys.shape
    attention = torch.zeros(num_heads, window, kv_len, dtype=torch.float64)
    for head in range(num_heads):
        for row in range(window):
            seen = kv_len - window + row + 1
            logits = keys[head // (num_heads // num_kv_heads), :seen].double() @ query[row, head].double() * scale
            attention[head, row, :seen] = logits.softmax(0)
    return attention


def pooled(scores: list[float], pool: str, width: int) -> list[float]:
    """Slide a centred window of ``width`` tokens; past the edges there is nothing to find, but "avg" divides by it."""
    half = width // 2
    around = [scores[max(token - half, 0) : token + half + 1] for token in range(len(scores))]
    return [max(one) if pool == "max" else sum(one) / width for one in around]


def snapkv_formula(policy: SnapKV, query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores [num_kv_heads, kv_len - window] of the tokens before the observation window."""
    attention = dense_attention(query, keys, scale).mean(1)[:, : -policy.window]
    by_group = attention.reshape(keys.shape[0], -1, attention.shape[1])
    reduce = {"mean": torch.mean, "max": torch.amax, "sum": torch.sum}[policy.group]
    rows = reduce(by_group, dim=1).tolist()
    return torch.tensor([pooled(row, policy.pool, policy.pool_kernel) for row in rows])


def make_inputs(
    policy,
    kv_len,
    num_kv_heads=2,
    group=3,
    packing="transposed",
    layout="LBHNC",
    dtype=torch.float32,
    scales=UNSCALED,
):
    """Inputs, and the dense keys that they stand for; a cache of an 8-bit ``dtype`` holds these by ``scales``."""
    generator = torch.Generator().manual_seed(kv_len)
    keys, values = (kv.to(dtype) for kv in random_kv(1, num_kv_heads, kv_len, HEAD_SIZE, generator))
    query = torch.randn(policy.window, num_kv_heads * group, HEAD_SIZE, generator=generator)
    num_blocks = -(-kv_len // BLOCK_SIZE)
    cache = make_pool(1, num_kv_heads, num_blocks + 3, BLOCK_SIZE, HEAD_SIZE, packing, layout, dtype)
    block_ids = scrambled_blocks(cache, num_blocks, generator)
    cache.write(keys, values, block_ids)
    pool = cache.pool
    page_table = pool.layer_page_ids(0, block_ids)
    inputs = ScoreInputs(query, *pool.readable(page_table), kv_len, HEAD_SIZE**-0.5, weights=scales)
    return inputs, keys[0].float() * scales.key_scale


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
@pytest.mark.parametrize("pool, pool_kernel", [("max", 7), ("avg", 5), ("max", 1), ("avg", 1), ("avg", 63)])
def test_equals_the_formula(packing, layout, group, pool, pool_kernel):
    policy = SnapKV(window=16, pool=pool, pool_kernel=pool_kernel, group=group)
    inputs, keys = make_inputs(policy, 135, packing=packing, layout=layout)
    expected = snapkv_formula(policy, inputs.query, keys, inputs.scale)
    torch.testing.assert_close(policy.score(inputs)[:, :-16], expected, **TOLERANCE)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_an_fp8_cache_is_judged_by_what_it_stands_for(dtype, scale, packing):
    inputs, keys = make_inputs(SnapKV(), 135, packing=packing, dtype=dtype, scales=LayerWeights(key_scale=scale))
    expected = snapkv_formula(SnapKV(), inputs.query, keys, inputs.scale)
    torch.testing.assert_close(SnapKV().score(inputs)[:, :-32], expected, **TOLERANCE)


@pytest.mark.parametrize("kv_len", [33, 34, 64, 97, 300])
@pytest.mark.parametrize("num_kv_heads, group", [(1, 1), (1, 4), (3, 1), (2, 2)])
def test_lengths_and_groups(kv_len, num_kv_heads, group):
    policy = SnapKV()
    inputs, keys = make_inputs(policy, kv_len, num_kv_heads, group)
    expected = snapkv_formula(policy, inputs.query, keys, inputs.scale)
    torch.testing.assert_close(policy.score(inputs)[:, : -policy.window], expected, **TOLERANCE)


def test_the_window_ranks_first_in_every_head():
    inputs, _ = make_inputs(SnapKV(), 200)
    scores = SnapKV().score(inputs)
    assert scores[:, -32:].amin() >= scores[:, :-32].amax()


def test_the_window_lends_nothing_to_its_neighbours():
    """Keys inside the window that draw nearly all attention must not lift the last tokens before it."""
    policy = SnapKV(window=16, pool="max", pool_kernel=15)
    inputs, keys = make_inputs(policy, 100, num_kv_heads=1, group=1)
    own_keys = inputs.keys[inputs.page_table[0]].flatten(0, 1)[:100]
    assert own_keys.equal(keys[0])
    last_page, slot = inputs.page_table[0, 84 // BLOCK_SIZE], 84 % BLOCK_SIZE
    inputs.keys[last_page, slot] = 20 * inputs.query.mean((0, 1))
    scores = policy.score(inputs)
    attention = dense_attention(
        inputs.query, inputs.keys[inputs.page_table[0]].reshape(1, -1, HEAD_SIZE)[:, :100], inputs.scale
    ).mean((0, 1))
    assert attention[84] > 2 * attention[:84].max()
    assert scores[0, :84].amax() < attention[84] / 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, r"snapkv\.window: expected a whole number of at least 1, got 0"),
        ({"window": -3}, r"snapkv\.window: expected a whole number of at least 1, got -3"),
        ({"pool_kernel": 0}, r"snapkv\.pool_kernel: expected an odd number of at least 1, got 0"),
        ({"pool_kernel": 4}, r"snapkv\.pool_kernel: expected an odd number of at least 1, got 4"),
        ({"pool_kernel": -3}, r"snapkv\.pool_kernel: expected an odd number of at least 1, got -3"),
        ({"pool": "min"}, r"snapkv\.pool: expected 'max' or 'avg', got 'min'"),
        ({"pool": None}, r"snapkv\.pool: expected 'max' or 'avg', got None"),
        ({"group": "median"}, r"snapkv\.group: expected 'mean', 'max' or 'sum', got 'median'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SnapKV(**options)


@pytest.mark.parametrize("option", ["window", "pool_kernel"])
@pytest.mark.parametrize("value", [33.0, "33", True])
def test_options_of_a_wrong_type_are_refused(option, value):
    """A number that is no whole number would pass here and fail in the worker, on the first request."""
    with pytest.raises(ValueError, match=rf"snapkv\.{option}: expected .*, got {value!r}"):
        SnapKV(**{option: value})


def test_what_it_asks_the_engine_for():
    assert SnapKV().query_window == SnapKV().num_recent == 32
    assert SnapKV(window=64).query_window == SnapKV(window=64).num_recent == 64
    assert SnapKV().num_sink == 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
class TestAgainstKvpress:
    policy = SnapKV(window=64, pool="avg", pool_kernel=5, group="mean")

    @torch.no_grad()
    def test_scores(self, kvpress, num_tokens, seed):
        layer = make_llama_layer(num_tokens, seed)
        theirs = self.press(kvpress).score(*layer.press_arguments())[0, :, :-64]
        inputs = layer.inputs(self.policy)
        # the same float32 operations in another order, on logits of a few tens
        torch.testing.assert_close(self.policy.score(inputs)[:, :-64], theirs, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("budget", [66, 96, 0.5, 0.75])
    @torch.no_grad()
    def test_kept_tokens(self, kvpress, num_tokens, seed, budget):
        """What is left in our pages after a whole eviction is what kvpress's ``compress`` returns, token by token."""
        plan = plan_eviction(num_tokens, budget, BLOCK_SIZE, 64)
        assert plan is not None
        layer = make_llama_layer(num_tokens, seed)
        # values that say which token they belong to
        layer = replace(layer, values=torch.arange(num_tokens).float()[:, None].expand_as(layer.values))
        press = self.press(kvpress, 1 - (plan.num_kept_tokens + 0.5) / num_tokens)
        scores = press.score(*layer.press_arguments())[0].sort(descending=True).values
        at_cut = scores[:, plan.num_kept_tokens - 1] - scores[:, plan.num_kept_tokens]
        assert (at_cut > 1e-6 * scores[:, plan.num_kept_tokens]).all(), "a tie at the cut: either choice would be right"
        theirs = press.compress(*layer.press_arguments())[1][0, :, :, 0].sort().values

        cache, block_ids = layer.cache()
        eviction = Eviction(Method(self.policy, Uniform(), 0, 64), plan, cache.pool, block_ids)
        eviction.score_layer(0, layer.query[-64:].contiguous(), layer.module.scaling)
        compaction = eviction.finish()
        for head, pages in enumerate(compaction.page_table[0]):
            kv_len = int(kv_lens_of(compaction, plan)[0, head])
            kept = cache.read(pages, kv_len)[1][:, 0].sort().values
            assert kept.tolist() == theirs[head].tolist()

    def press(self, kvpress, compression_ratio=0.5):
        return kvpress.SnapKVPress(compression_ratio, window_size=64, kernel_size=5)
