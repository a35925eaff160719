"""One request's eviction from its queries to its compacted cache, on a pool with nothing but NaN around it."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compactions import kv_lens_of
from tests.gpu import HAS_GPU, on_gpu
from tests.paged import LAYOUTS, PACKINGS, PagedCache, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.budgets import ALLOCATORS, BudgetAllocator
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, plan_eviction
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.policies import EvictionPolicy, ScoreInputs
from vllm_kvevict.policies.snapkv import SnapKV

LAYERS, KV_HEADS, GROUP, HEAD_SIZE, SCALE = 3, 2, 2, 16, 0.25


@dataclass(frozen=True)
class Ragged(BudgetAllocator):
    """Wishes drawn at random, some of them far beyond what a head can hold, some of them zero."""

    seed: int = 0

    def wish(self, scores: torch.Tensor, num_tokens: float, measures: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        wish = torch.rand(scores.shape[:2], generator=generator, dtype=torch.float64) ** 8
        return wish * (torch.rand(scores.shape[:2], generator=generator) < 0.8)


@dataclass(frozen=True)
class FirstTokens(EvictionPolicy):
    """Scores that say: the earlier the better. NaN for the first token, which then is the worst."""

    def scratch_bytes(self, num_heads, num_kv_heads, head_size):
        return 4 * num_kv_heads

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        scores = -torch.arange(inputs.kv_len, dtype=torch.float32).expand(inputs.page_table.shape[0], -1).clone()
        scores[:, 0] = float("nan")
        return scores


@dataclass
class Prompt:
    """A prefilled request: its cache, its dense K and V, and its last queries in every layer."""

    num_tokens: int
    block_size: int = 16
    packing: str = "transposed"
    layout: str = "LBHNC"
    seed: int = 0
    dtype: torch.dtype = torch.float32
    cache: PagedCache = field(init=False)
    block_ids: torch.Tensor = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        num_blocks = -(-self.num_tokens // self.block_size)
        sizes = LAYERS, KV_HEADS, num_blocks + 4, self.block_size, HEAD_SIZE
        self.cache = make_pool(*sizes, self.packing, self.layout, self.dtype)
        self.block_ids = scrambled_blocks(self.cache, num_blocks, generator)
        kv = random_kv(LAYERS, KV_HEADS, self.num_tokens, HEAD_SIZE, generator)
        self.keys, self.values = (tensor.to(self.dtype) for tensor in kv)
        self.cache.write(self.keys, self.values, self.block_ids)
        self.queries = torch.randn(LAYERS, 64, KV_HEADS * GROUP, HEAD_SIZE, generator=generator)

    def evict(self, method: Method, plan: EvictionPlan) -> Compaction:
        return evict(method, plan, self.cache.pool, self.block_ids, self.queries)

    def kv_lens(self, compaction: Compaction) -> torch.Tensor:
        return kv_lens_of(compaction, EvictionPlan(self.num_tokens, 1, self.block_size))

    def kept_tokens(self, compaction: Compaction, layer: int, head: int) -> list[int]:
        """Which tokens a head reads, recognised by their keys; their values must be the right ones."""
        kv_len = int(self.kv_lens(compaction)[layer, head])
        keys, values = self.cache.read(compaction.page_table[layer, head], kv_len)
        tokens = (keys.float()[:, None] == self.keys[layer, head].float()).all(-1).nonzero()[:, 1]
        assert len(tokens) == kv_len
        assert values.float().equal(self.values[layer, head, tokens].float())
        return sorted(tokens.tolist())


def evict(
    method: Method, plan: EvictionPlan, pool: PagePool, block_ids: torch.Tensor, queries: torch.Tensor
) -> Compaction:
    eviction = Eviction(method, plan, pool, block_ids)
    for layer in range(LAYERS):
        eviction.score_layer(layer, queries[layer, 64 - method.query_window :], SCALE)
    return eviction.finish()


HEADS = list(product(range(LAYERS), range(KV_HEADS)))


def held_pages(compaction: Compaction) -> Counter:
    counts = compaction.num_pages
    return Counter(page for head in HEADS for page in compaction.page_table[head][: counts[head]].tolist())


def pages_of_blocks(prompt: Prompt, blocks: list[int]) -> set[int]:
    return {prompt.cache.page_id(layer, block, head) for (layer, head), block in product(HEADS, blocks)}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size, num_tokens", [(16, 160), (16, 170), (32, 300), (64, 401)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_keeps_the_tokens_with_the_highest_scores(packing, layout, block_size, num_tokens, dtype):
    prompt = Prompt(num_tokens, block_size, packing, layout, dtype=dtype)
    policy = SnapKV(window=8, pool="avg")
    plan = plan_eviction(num_tokens, 0.4, block_size, 8)
    pool = prompt.cache.pool
    scores = [
        policy.score(
            ScoreInputs(
                prompt.queries[layer, -8:],
                *pool.readable(pool.layer_page_ids(layer, prompt.block_ids)),
                num_tokens,
                SCALE,
            )
        )
        for layer in range(LAYERS)
    ]
    compaction = prompt.evict(Method(policy, Uniform(), 0, 8), plan)
    for layer, head in HEADS:
        best = scores[layer][head, :-8].topk(plan.num_kept_tokens - 8).indices.tolist()
        expected = sorted([*best, *range(num_tokens - 8, num_tokens)])
        assert prompt.kept_tokens(compaction, layer, head) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("allocator", [name for name in ALLOCATORS.names() if name != "fixed"])  # which needs a file
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_gpu_evicts_as_the_cpu_does(allocator, packing, dtype):
    method = Method(SnapKV(window=8), ALLOCATORS.get(allocator)(), 4, 8)
    plan = plan_eviction(300, 0.4, 16, method.num_protected)
    cpu, gpu = Prompt(300, 16, packing, dtype=dtype), Prompt(300, 16, packing, dtype=dtype)
    expected = cpu.evict(method, plan)
    actual = on_gpu(evict)(method, plan, gpu.cache.pool, gpu.block_ids, gpu.queries)
    assert actual.page_table.equal(expected.page_table)
    assert actual.num_pages.equal(expected.num_pages)
    assert gpu.cache.pool.pages.view(torch.uint8).equal(cpu.cache.pool.pages.view(torch.uint8))


def test_an_unscored_token_goes_first_and_the_early_ones_stay():
    prompt = Prompt(100)
    plan = plan_eviction(100, 48, 16, 0)
    compaction = prompt.evict(Method(FirstTokens(), Uniform(), 0, 0), plan)
    for head in HEADS:
        assert prompt.kept_tokens(compaction, *head) == list(range(1, 1 + plan.num_kept_tokens))


@pytest.mark.parametrize("num_sink, num_recent", [(0, 0), (4, 0), (0, 20), (4, 20), (1, 33)])
@pytest.mark.parametrize("num_tokens", [160, 161, 175])
def test_protected_tokens_stay_in_every_head(num_sink, num_recent, num_tokens):
    """The budget is the least that holds them, and wishes go to other heads."""
    prompt = Prompt(num_tokens)
    plan = plan_eviction(num_tokens, 1, 16, num_sink + num_recent)
    protected = {*range(num_sink), *range(num_tokens - num_recent, num_tokens)}
    compaction = prompt.evict(Method(SnapKV(window=8), Ragged(3), num_sink, num_recent), plan)
    for head in HEADS:
        assert protected <= set(prompt.kept_tokens(compaction, *head))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    budget=st.sampled_from([1, 40, 64, 0.3, 0.6, 0.95]),
    num_tokens=st.sampled_from([33, 64, 97, 128, 200]),
    num_recent=st.sampled_from([0, 1, 17, 30]),
)
def test_ragged_wishes_conserve_pages_and_tokens(seed, budget, num_tokens, num_recent):
    plan = plan_eviction(num_tokens, budget, 16, num_recent)
    if plan is None:
        return
    prompt = Prompt(num_tokens, seed=seed)
    compaction = prompt.evict(Method(SnapKV(window=4), Ragged(seed), 0, num_recent), plan)
    held = held_pages(compaction)
    assert set(held) == pages_of_blocks(prompt, prompt.block_ids[plan.first_kept_block :].tolist())
    assert set(held.values()) == {1}
    assert int(prompt.kv_lens(compaction).sum()) == plan.num_kept_tokens * len(HEADS)
    for head in HEADS:
        tokens = prompt.kept_tokens(compaction, *head)
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) >= set(range(num_tokens - num_recent, num_tokens))


def test_wishes_are_followed():
    """Ragged wishes must make ragged heads, or the tests above would show little."""
    prompt = Prompt(200)
    compaction = prompt.evict(Method(SnapKV(window=4), Ragged(1), 0, 0), plan_eviction(200, 100, 16, 0))
    assert len(set(prompt.kv_lens(compaction).flatten().tolist())) > 2
    assert int(prompt.kv_lens(compaction).max()) <= 200


def test_an_allocator_by_name(monkeypatch):
    monkeypatch.setitem(ALLOCATORS._classes, "test-ragged", Ragged)
    config = EvictionConfig.parse(
        {"policy": "snapkv", "budget": 100, "allocator": "test-ragged", "allocator_options": {"seed": 5}}
    )
    method = config.method()
    assert method == Method(SnapKV(), Ragged(5), 0, 32)
    prompt = Prompt(200)
    compaction = prompt.evict(method, plan_eviction(200, 100, 16, method.num_protected))
    assert len(set(prompt.kv_lens(compaction).flatten().tolist())) > 1


@pytest.mark.parametrize("scored", [[], [0, 2], [1]])
def test_a_layer_that_was_not_scored_is_an_error_and_nothing_moves(scored):
    prompt = Prompt(160)
    plan = plan_eviction(160, 64, 16, 8)
    eviction = Eviction(Method(SnapKV(window=8), Uniform(), 0, 8), plan, prompt.cache.pool, prompt.block_ids)
    for layer in scored:
        eviction.score_layer(layer, prompt.queries[layer, -8:], SCALE)
    before = prompt.cache.pool.pages.clone()
    missing = [layer for layer in range(LAYERS) if layer not in scored]
    with pytest.raises(RuntimeError) as error:
        eviction.finish()
    assert f"layers {missing} were not scored" in str(error.value)
    assert prompt.cache.pool.pages.view(torch.int32).equal(before.view(torch.int32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", [name for name in ALLOCATORS.names() if name != "fixed"])
def test_a_key_that_is_not_finite_ends_no_eviction(name, bad):
    prompt = Prompt(160)
    prompt.keys[1, 0, 20, 3] = bad
    prompt.cache.write(prompt.keys, prompt.values, prompt.block_ids)
    method = Method(SnapKV(window=8), ALLOCATORS.get(name)(), 2, 8)
    compaction = prompt.evict(method, plan_eviction(160, 64, 16, 10))
    assert int(compaction.num_pages.sum()) == 4 * len(HEADS)
    if name == "cake":
        assert (compaction.num_pages == 4).all(), "what it measures of a layer is not finite: all get the same"


def test_seconds_count_scoring_and_the_rest(monkeypatch):
    """Each call takes 2 seconds of a clock that ticks once per look."""
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr("vllm_kvevict.eviction.prompt.perf_counter", lambda: float(next(ticks)))
    prompt = Prompt(160)
    plan = plan_eviction(160, 64, 16, 8)
    eviction = Eviction(Method(SnapKV(window=8), Uniform(), 0, 8), plan, prompt.cache.pool, prompt.block_ids)
    assert eviction.seconds == 0
    for layer in range(LAYERS):
        eviction.score_layer(layer, prompt.queries[layer, -8:], SCALE)
        assert eviction.seconds == 2 * (layer + 1)
    eviction.finish()
    assert eviction.seconds == 2 * (LAYERS + 3)  # summing up, choosing and moving


def test_evicting_twice_the_same_gives_the_same():
    compactions = [
        Prompt(200).evict(Method(SnapKV(window=8), Ragged(1), 2, 8), plan_eviction(200, 64, 16, 10)) for _ in range(2)
    ]
    first, second = compactions
    assert first.page_table.equal(second.page_table)
    assert first.num_pages.equal(second.num_pages)


def test_num_recent_below_the_window_does_not_shrink_what_a_budget_must_hold():
    """Else a prefix-cache hit could cover queries that the policy has to see."""
    config = EvictionConfig.parse({"policy": "snapkv", "budget": 16, "num_recent": 1})
    assert config.method().min_tokens == 32
    with pytest.raises(ValueError, match=r"kv_budget: expected at least 33 tokens.*1 protected, 32 observed"):
        config.check_block_size(16)
