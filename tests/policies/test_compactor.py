"""Compactor against the paper's formula, dense and in float64, and against kvpress's implementation of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.compactions import kv_lens_of
from tests.llama_layer import BLOCK_SIZE, make_llama_layer
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.policies.compactor import Compactor, gaussian_sketch, standardise
from vllm_kvevict.policies.inputs import ScoreInputs

NUM_KV_HEADS, HEAD_SIZE = 2, 32
# z-scores have variance 1, and their parts are float32 sums over a chunk: 1e-4 of a standard deviation
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def preset(column):
    """Options of a column of the table in the docstring."""
    rows = [line.split("|")[1:-1] for line in Compactor.__doc__.splitlines() if line.strip().startswith("|")]
    index = [cell.strip() for cell in rows[0]].index(column)
    return {row[0].strip(): json.loads(row[index]) for row in rows[2:]}


ENGINE, KVPRESS = preset("engine"), preset("kvpress")


def leverage_blocks(num_tokens, size):
    bounds = [*range(0, num_tokens, size or num_tokens), num_tokens]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < size / 2:
        del bounds[-2]
    return list(pairwise(bounds))


def z(scores, per_head=False):
    if per_head:
        return torch.stack([z(head) for head in scores])
    return (scores - scores.mean()) / scores.std()


def dense_leverage(policy, keys):
    """[heads, tokens] float64, of the block's keys before RoPE [heads, tokens, head_size]."""
    sketch = gaussian_sketch(HEAD_SIZE, policy.sketch_rank, policy.seed)
    leverage = []
    for head in keys:
        x = (head - head.mean(0)) @ sketch
        if policy.ridge:
            inverse = torch.linalg.inv(x.T @ x + policy.ridge * torch.eye(x.shape[1]))
            leverage.append((x @ inverse * x).sum(1))
        else:
            leverage.append((x * torch.linalg.pinv(x, rtol=1e-9).T).sum(1))
    return torch.stack(leverage)


def dense_attention(policy, query, keys, values, scale, padding):
    """[kv heads, tokens] float64; ``padding``: as kvpress pads the last chunk, with zeros that take part."""
    group = query.shape[1] // len(keys)
    attention = torch.zeros(len(keys), group, keys.shape[1], dtype=torch.float64)
    for start in range(0, keys.shape[1], policy.chunk):
        end = min(start + policy.chunk, keys.shape[1])
        missing = start + policy.chunk - end if padding else 0
        for head in range(query.shape[1]):
            logits = query[start:end, head] @ keys[head // group, start:end].T * (scale if policy.scale_logits else 1)
            weights = torch.nn.functional.pad(logits, (0, missing)).softmax(1)[:, : end - start].sum(0)
            attention[head // group, head % group, start:end] = weights + missing / policy.chunk
    reduced = attention.amax(1) if policy.group == "max" else attention.sum(1)
    if policy.value_norm:
        reduced = reduced * values.norm(dim=-1)
    half = policy.pool_kernel // 2
    padded = torch.nn.functional.pad(reduced, (half, half))
    return padded.unfold(1, policy.pool_kernel, 1).mean(-1)


@torch.no_grad()
def formula(policy, layer, weight, padding=False):
    """Scores float64 of the tokens that are scored; keys before RoPE are those of the module, never un-rotated."""
    first, last = (policy.num_sink, policy.num_recent) if policy.exclude_protected else (0, 0)
    scored = slice(first, layer.num_tokens - last)
    raw_keys = layer.module.k_proj(layer.hidden_states)[0].unflatten(1, (-1, HEAD_SIZE)).transpose(0, 1)
    raw_keys = raw_keys[:, scored].double()
    query, keys, values = layer.query[scored], layer.keys[:, scored], layer.values[:, scored]
    attention = dense_attention(policy, query.double(), keys.double(), values.double(), layer.module.scaling, padding)
    blocks = [
        dense_leverage(policy, raw_keys[:, start:end])
        for start, end in leverage_blocks(raw_keys.shape[1], policy.leverage_block)
    ]
    per_head = policy.z_scope == "head"
    if policy.z_scope == "block":
        leverage = torch.cat([z(block) for block in blocks], 1)
    else:
        leverage = z(torch.cat(blocks, 1), per_head)
    return z(attention, per_head) + weight * leverage, scored


@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_logits": True},
        {"group": "max", "pool_kernel": 7},
        {"z_scope": "head", "leverage_weight": 2.0},
        {"leverage_weight": 0},
        {"leverage_weight": 50.0, "sketch_rank": 16},
        {"leverage_weight": 50.0, "leverage_block": 100, "z_scope": "block"},
        {"leverage_weight": 50.0, "leverage_block": 100},
        {"chunk": 64, "value_norm": True, "ridge": 1.0},
        {"chunk": 1000, "exclude_protected": True, "num_sink": 3, "num_recent": 20, "seed": 7},
        {"chunk": 10, "exclude_protected": True, "num_sink": 40, "num_recent": 33},
        ENGINE,
    ],
    ids=str,
)
def test_equals_the_formula(options, num_tokens):
    policy = Compactor(**options)
    layer = make_llama_layer(num_tokens, seed=0)
    expected, scored = formula(policy, layer, policy.leverage_weight)
    scores = policy.score(layer.inputs(policy, chunks=[64]))
    torch.testing.assert_close(scores[:, scored], expected.float(), rtol=1e-4, atol=1e-4 * (1 + policy.leverage_weight))
    assert scores.amax() == scores[:, scored].amax()
    assert (scores[:, : scored.start] == scores.amax()).all()
    assert (scores[:, scored.stop :] == scores.amax()).all()


def leverage_of(policy, inputs, blocks):
    """[num_kv_heads, num_tokens] of consecutive blocks of one prompt."""
    of_prompt = [(0, *bounds) for bounds in blocks]
    found, lens = policy._leverage_of_blocks(ScoreInputs.together([inputs]), inputs.weights.rotary, of_prompt)
    assert lens.tolist() == [end - start for start, end in blocks]
    return torch.cat([of_block[:, :count] for of_block, count in zip(found, lens.tolist(), strict=True)], dim=1)


@pytest.mark.parametrize(
    "num_tokens, rank, block, expected",
    [
        (1000, 48, None, 32),  # the rank of the sketch is that of the keys, of head size 32
        (1000, 16, None, 16),
        (20, 48, None, 19),  # and centring takes one from that of the tokens
        (1000, 16, 100, 16),
        (1000, 16, 499, 16),
        (1, 48, None, 0),
    ],
)
def test_leverage_sums_to_the_rank(num_tokens, rank, block, expected):
    layer = make_llama_layer(num_tokens, seed=0)
    policy = Compactor(sketch_rank=rank, leverage_block=block)
    blocks = leverage_blocks(num_tokens, block)
    assert list(policy._blocks(0, num_tokens)) == blocks
    inputs, with_ridge = layer.inputs(policy), replace(policy, ridge=1.0)
    leverage, ridged = (leverage_of(some, inputs, blocks) for some in (policy, with_ridge))
    for start, end in blocks:
        torch.testing.assert_close(leverage[:, start:end].sum(1), torch.full((2,), float(expected)), rtol=1e-5, atol=0)
    if num_tokens > 1:
        for start, end in blocks:
            assert (ridged[:, start:end].sum(1) < expected - 1e-3).all()
            assert (ridged[:, start:end].sum(1) > 0.7 * expected).all()
        assert (ridged <= leverage * (1 + 1e-6)).all()


@pytest.mark.parametrize("num_tokens, expected", [
    (511, [511]), (512, [512]), (513, [513]), (767, [767]), (768, [512, 256]), (1025, [512, 513]), (1024, [512, 512]),
])  # fmt: skip
def test_a_short_last_block_joins_the_one_before(num_tokens, expected):
    assert [end - start for start, end in Compactor(leverage_block=512)._blocks(0, num_tokens)] == expected


@pytest.mark.parametrize("options", [{}, ENGINE, KVPRESS, {"chunk": 100, "leverage_block": 300}], ids=str)
@pytest.mark.parametrize("num_tokens", [333, 1003])
def test_chunks_of_the_prefill_do_not_matter(options, num_tokens):
    policy = Compactor(**options)
    layer = make_llama_layer(num_tokens, seed=0)
    whole = policy.score(layer.inputs(policy))
    kept = torch.full((1, NUM_KV_HEADS), 96)
    expected = select(protect(whole[None], policy.num_sink, policy.num_recent), kept)
    for chunks in ([64], [256], [1000], [7], [3, 300, 90]):
        scores = policy.score(layer.inputs(policy, chunks=chunks))
        torch.testing.assert_close(scores, whole, rtol=1e-5, atol=1e-5)
        assert select(protect(scores[None], policy.num_sink, policy.num_recent), kept).equal(expected)


@pytest.mark.parametrize(
    "options, most_queries", [({}, 255), (ENGINE, 127), (KVPRESS, 259)], ids=["paper", "engine", "kvpress"]
)
def test_the_state_is_one_chunk_of_queries_and_a_score_for_every_token(options, most_queries):
    policy = Compactor(**options)
    layer = make_llama_layer(1000, seed=0)
    inputs = replace(layer.inputs(policy), state=None)
    state, held = None, []
    for start in range(0, 1000, 50):
        query = layer.query[start : start + 50].clone()
        state = policy.observe(state, replace(inputs, query=query, kv_len=start + 50))
        held.append(len(state.queries))
        assert state.queries.untyped_storage().nbytes() == 4 * state.queries.numel()
        assert state.queries.untyped_storage().data_ptr() != query.untyped_storage().data_ptr()
    assert most_queries - 50 < max(held) <= most_queries
    num_bytes = sum(attention.untyped_storage().nbytes() for attention in state.attention)
    scored = 1000 - held[-1] - (policy.num_sink if policy.exclude_protected else 0)
    assert num_bytes == scored * policy.state_bytes(8, NUM_KV_HEADS, HEAD_SIZE)


@pytest.mark.parametrize(
    "options", [{}, ENGINE, KVPRESS, {"z_scope": "head"}, {"leverage_block": 2, "ridge": 0.0}], ids=str
)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 11, 12, 13, 14])
def test_tiny_prompts(options, num_tokens):
    policy = Compactor(**options)
    scores = policy.score(make_llama_layer(num_tokens, seed=0).inputs(policy, chunks=[1]))
    assert scores.shape == (NUM_KV_HEADS, num_tokens)
    assert torch.isfinite(scores).all()


def test_rounding_is_not_blown_up_to_a_ranking():
    """The leverage of each of m tokens, m below the rank, is 1 - 1/m."""
    policy = Compactor(leverage_weight=100.0)
    layer = make_llama_layer(12, seed=0)
    inputs = layer.inputs(policy)
    leverage, _ = policy._leverage_of_blocks(ScoreInputs.together([inputs]), inputs.weights.rotary, [(0, 0, 12)])
    standardise(leverage, torch.tensor([12]), by_head=False)
    assert leverage[..., :12].abs().amax() < 1e-2


def test_the_sketch():
    sketch = gaussian_sketch(128, 48, 0)
    assert sketch.equal(gaussian_sketch.__wrapped__(128, 48, 0))
    assert not sketch.equal(gaussian_sketch(128, 48, 1))
    torch.testing.assert_close(sketch.var() * 48, torch.tensor(1.0, dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize("column", ["default", "engine", "kvpress"])
def test_presets_are_options_of_the_command_line(column):
    """The docstring's table, as JSON; its first column are the defaults."""
    config = EvictionConfig.parse({"policy": "compactor", "budget": 256, "policy_options": preset(column)})
    method = config.method()
    assert method.policy == Compactor(**preset(column))
    assert (method.num_sink, method.num_recent) == (preset(column)["num_sink"], preset(column)["num_recent"])
    assert (method.policy == Compactor()) == (column == "default")
    assert config.allocator_name == "adakv"


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("sketch_rank", 0, "a whole number of at least 1"),
        ("sketch_rank", 4.0, "a whole number of at least 1"),
        ("chunk", 0, "a whole number of at least 1"),
        ("chunk", True, "a whole number of at least 1"),
        ("num_sink", -1, "a whole number of at least 0"),
        ("num_recent", "4", "a whole number of at least 0"),
        ("seed", None, "a whole number of at least 0"),
        ("leverage_block", 1, "a whole number of at least 2 or None"),
        ("leverage_block", 512.0, "a whole number of at least 2 or None"),
        ("pool_kernel", 2, "an odd number of at least 1"),
        ("leverage_weight", -0.1, "a number of at least 0 or None"),
        ("leverage_weight", float("nan"), "a number of at least 0 or None"),
        ("leverage_weight", "0.3", "a number of at least 0 or None"),
        ("ridge", -1, "a number of at least 0"),
        ("ridge", None, "a number of at least 0"),
        ("scale_logits", 1, "true or false"),
        ("value_norm", None, "true or false"),
        ("exclude_protected", "yes", "true or false"),
        ("z_scope", "token", "'layer', 'block' or 'head'"),
        ("group", "sum", "'mean' or 'max'"),
    ],
)
def test_wrong_options_are_refused(option, value, expected):
    with pytest.raises(ValueError, match=rf"compactor\.{option}: expected {expected}, got {value!r}"):
        Compactor(**{option: value})


def test_what_it_asks_the_engine_for():
    assert Compactor().query_window == 0
    assert not Compactor().query_aware


@pytest.fixture
def same_sketch(kvpress, monkeypatch):
    """kvpress draws the sketch of Compactor(seed=0)."""

    leverage_press = sys.modules[kvpress.LeverageScorePress.__module__]

    def randn(batch, heads, head_size, rank, **kwargs):
        return (gaussian_sketch(head_size, rank, 0) * rank**0.5).float().expand(batch, heads, -1, -1)

    monkeypatch.setattr(leverage_press, "torch", SimpleNamespace(**{**vars(torch), "randn": randn}))


@pytest.mark.parametrize("seed", [0, 1])
class TestAgainstKvpress:
    # chunks that divide the scored tokens, since kvpress pads the last one; 130 = 8 + 2 * 59 + 4
    LENGTHS = pytest.mark.parametrize(
        "num_tokens, chunk", [(130, 59), (333, 107), (1000, 247), (268, 256), (1036, 256)]
    )

    @LENGTHS
    @pytest.mark.parametrize("kept_fraction", [0.25, 0.5, None])
    @torch.no_grad()
    def test_scores(self, kvpress, same_sketch, seed, num_tokens, chunk, kept_fraction):
        layer = make_llama_layer(num_tokens, seed)
        policy = Compactor(**{**KVPRESS, "chunk": chunk})
        press = kvpress.CompactorPress(chunk_size=chunk, blending=0.35)
        num_kept = None
        if kept_fraction is not None:
            num_kept = int(num_tokens * kept_fraction)
            press = kvpress.CompactorPress(compression_ratio=1 - num_kept / num_tokens, chunk_size=chunk)
        theirs = press.score(*layer.press_arguments())[0]
        inputs = replace(layer.inputs(policy, chunks=[64]), num_kept=num_kept)
        torch.testing.assert_close(policy.score(inputs), theirs, **TOLERANCE)

    @pytest.mark.parametrize("num_tokens, chunk", [(130, 256), (333, 256), (1000, 256)])
    @torch.no_grad()
    def test_a_partial_chunk_differs_by_its_padding_only(self, kvpress, same_sketch, seed, num_tokens, chunk):
        layer = make_llama_layer(num_tokens, seed)
        policy = Compactor(**{**KVPRESS, "chunk": chunk})
        theirs = kvpress.CompactorPress(chunk_size=chunk, blending=0.35).score(*layer.press_arguments())[0]
        padded, scored = formula(policy, layer, 0.35, padding=True)
        torch.testing.assert_close(theirs[:, scored], padded.float(), **TOLERANCE)
        exact, _ = formula(policy, layer, 0.35)
        ours = policy.score(layer.inputs(policy, chunks=[64]))[:, scored]
        torch.testing.assert_close(ours, exact.float(), **TOLERANCE)
        assert (exact - padded).abs().amax() > 100 * TOLERANCE["atol"]

    @LENGTHS
    @pytest.mark.parametrize("budget", [66, 0.5])
    @torch.no_grad()
    def test_kept_tokens(self, kvpress, same_sketch, seed, num_tokens, chunk, budget):
        """What is left in our pages after a whole eviction is what kvpress's ``compress`` returns, token by token."""
        plan = plan_eviction(num_tokens, budget, BLOCK_SIZE, 12)
        policy = Compactor(**{**KVPRESS, "chunk": chunk})
        # values that say which token they belong to, and whose norms differ little
        layer = make_llama_layer(num_tokens, seed)
        marks = torch.arange(num_tokens).float()[:, None].expand_as(layer.values)
        layer = replace(layer, values=marks + 1000)
        press = kvpress.CompactorPress(1 - (plan.num_kept_tokens + 0.5) / num_tokens, chunk_size=chunk)
        press.blending = 1 - plan.num_kept_tokens / num_tokens
        scores = press.score(*layer.press_arguments())[0].sort(descending=True).values
        at_cut = scores[:, plan.num_kept_tokens - 1] - scores[:, plan.num_kept_tokens]
        assert (at_cut > 1e-5).all(), "a tie at the cut: either choice would be right"
        theirs = press.compress(*layer.press_arguments())[1][0, :, :, 0].sort().values

        inputs = layer.inputs(policy, chunks=[64])
        cache, block_ids = layer.cache()
        eviction = Eviction(Method(policy, Uniform(), policy.num_sink, policy.num_recent), plan, cache.pool, block_ids)
        eviction.score_layer(0, inputs.query, inputs.scale, None, inputs.weights, inputs.state)
        compaction = eviction.finish()
        for head, pages in enumerate(compaction.page_table[0]):
            kept = cache.read(pages, int(kv_lens_of(compaction, plan)[0, head]))[1][:, 0].sort().values
            assert kept.tolist() == theirs[head].tolist()
