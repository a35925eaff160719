"""gather_tiled_tokens and move_tiled_tokens read and write exactly the elements of their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged import make_pool, random_kv, scrambled_blocks
from vllm_kvevict.kernels import tiled_tokens as module
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.tiled_tokens import (
    gather_tiled_tokens,
    gather_tiled_tokens_reference,
    move_tiled_tokens,
    move_tiled_tokens_reference,
)

REFERENCE = pytest.param((gather_tiled_tokens_reference, move_tiled_tokens_reference), id="reference")
NATIVE = pytest.param(
    (gather_tiled_tokens, move_tiled_tokens),
    id="native",
    marks=pytest.mark.skipif(
        library() is None, reason="the CPU kernels are not built: run `python setup.py build_ext --inplace`"
    ),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("functions", [REFERENCE, NATIVE])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    block_size=st.sampled_from([16, 32, 96]),
    head_size=st.sampled_from([16, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(2, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_gathers_and_moves_exactly(functions, block_size, head_size, dtype, num_tokens, seed):
    gather, move = functions
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-num_tokens // block_size)
    cache = make_pool(2, 2, num_blocks + 3, block_size, head_size, "tiled", "BLHNC", dtype)
    keys, values = (kv.to(dtype) for kv in random_kv(2, 2, num_tokens, head_size, generator))
    block_ids = scrambled_blocks(cache, num_blocks, generator)
    cache.write(keys, values, block_ids)
    pool = cache.pool
    pages = pool.page_ids(block_ids)[..., None] * block_size
    slots = (pages + torch.arange(block_size)).flatten(2)[..., :num_tokens]  # [layers, heads, tokens]
    for part, expected in zip(gather(pool.keys, pool.values, slots), (keys, values), strict=True):
        assert part.dtype == dtype
        assert part.float().equal(expected.float())
    order = torch.randperm(num_tokens, generator=generator)
    source, destination = order[: num_tokens // 2], order[num_tokens // 2 : num_tokens // 2 * 2]
    before = pool.pages.clone()
    gaps = torch.full((7,), -1)
    moves = (torch.cat([gaps, slots[..., half].flatten(), gaps]) for half in (source, destination))
    move(pool.keys, pool.values, *moves)
    moved = keys.float().clone(), values.float().clone()
    for part in moved:
        part[:, :, destination] = part[:, :, source]
    for part, expected in zip(gather_tiled_tokens_reference(pool.keys, pool.values, slots), moved, strict=True):
        assert part.float().equal(expected)
    # nothing else has changed: moved back, all is as it was
    cache.write(keys, values, block_ids)
    assert pool.pages.view(torch.uint8).equal(before.view(torch.uint8))


def test_places_are_those_of_vllm_s_attention_for_amx():
    """A cache of one block, filled by vLLM's own operator with elements that are their own numbers."""
    ops = pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed")
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("this machine has no AMX")
    torch.cpu._init_amx()
    block_size, head_size = 32, 64
    numbers = torch.arange(block_size * head_size, dtype=torch.int16).view(block_size, 1, head_size)
    cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=torch.bfloat16)
    key_cache, value_cache = cache.chunk(2, dim=2)
    tokens = numbers.view(torch.bfloat16)
    ops.cpu_attn_reshape_and_cache(tokens, tokens, key_cache, value_cache, torch.arange(block_size), "amx")
    pages = [part.reshape(1, block_size, head_size) for part in (key_cache, value_cache)]
    for part in gather_tiled_tokens(*pages, torch.arange(block_size)):
        assert part.view(torch.int16).equal(numbers[:, 0])


def test_nothing_to_move():
    pages, none = torch.zeros(2, 16, 16), torch.empty(0, dtype=torch.int64)
    move_tiled_tokens(pages, pages.clone(), none, none)
    assert gather_tiled_tokens(pages, pages, none)[0].shape == (0, 16)


def test_reference_without_library(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: None)
    keys, values = torch.randn(2, 2, 16, 16).unbind(0)
    expected = gather_tiled_tokens(keys, values, torch.tensor([3]))
    move_tiled_tokens(keys, values, torch.tensor([3]), torch.tensor([20]))
    moved = gather_tiled_tokens(keys, values, torch.tensor([20]))
    assert all(one.equal(other) for one, other in zip(moved, expected, strict=True))


PAGES, SLOTS = torch.zeros(4, 16, 32), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PAGES[:, :8], PAGES, SLOTS, SLOTS), "`keys`: expected contiguous pages .* multiples of 16"),
        ((PAGES.double(), PAGES, SLOTS, SLOTS), "`keys`: expected contiguous pages .* got torch.float64"),
        ((PAGES, PAGES[..., ::2], SLOTS, SLOTS), "`values`: expected contiguous pages"),
        ((PAGES, PAGES[:3], SLOTS, SLOTS), "`values`: expected what `keys` are"),
        ((PAGES, PAGES, SLOTS.int(), SLOTS), "`source`: expected int64 on cpu, got torch.int32"),
        ((PAGES, PAGES, SLOTS, SLOTS + 62), "`destination`: expected slots -1 to 63, got 63 to 64"),
        ((PAGES, PAGES, SLOTS, SLOTS[:1]), "`destination`: expected slots .2,., got .1,."),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        move_tiled_tokens(*arguments)
