"""The page pool finds every page of vLLM's allocation, whatever the layout and the packing."""

import pytest
import torch

from tests.paged import LAYOUTS, PACKINGS, make_layers, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.cache.pages import PagePool

LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE = 3, 2, 7, 16, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_keys_and_values_of_a_request_are_read_through_page_ids(packing, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    cache = make_pool(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE, packing, layout, dtype)
    keys, values = (kv.to(dtype) for kv in random_kv(LAYERS, HEADS, 5 * BLOCK_SIZE, HEAD_SIZE, generator))
    block_ids = scrambled_blocks(cache, 5, generator)
    cache.write(keys, values, block_ids)
    page_ids = cache.pool.page_ids(block_ids)
    assert page_ids.shape == (LAYERS, HEADS, 5)
    assert page_ids.dtype == torch.int64
    read_keys, read_values, read_ids = cache.pool.readable(page_ids)
    assert read_keys[read_ids].flatten(2, 3).equal(keys)
    assert read_values[read_ids].flatten(2, 3).equal(values)
    slots = (page_ids[..., None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(2)
    assert all(one.equal(other) for one, other in zip(cache.pool.gather(slots), (keys, values), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_page_ids_count_every_page_once(layout):
    cache = make_pool(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE, layout=layout)
    page_ids = cache.pool.page_ids(torch.arange(BLOCKS))
    assert page_ids.flatten().sort().values.equal(torch.arange(LAYERS * BLOCKS * HEADS))
    expected = [
        [[cache.page_id(layer, block, head) for block in range(BLOCKS)] for head in range(HEADS)]
        for layer in range(LAYERS)
    ]
    assert page_ids.tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_page_ids_of_one_layer_are_a_slice_of_all(layout, shape):
    pool = make_pool(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE, layout=layout).pool
    block_ids = torch.randint(0, BLOCKS, shape, dtype=torch.int32)
    page_ids = pool.page_ids(block_ids)
    assert page_ids.shape == (LAYERS, HEADS, *shape)
    for layer in range(LAYERS):
        assert pool.layer_page_ids(layer, block_ids).equal(page_ids[layer])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_may_come_in_any_order(layout):
    layers = make_layers(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE, layout)
    order = [2, 0, 1]
    straight = PagePool.from_layers(layers, "interleaved")
    shuffled = PagePool.from_layers([layers[layer] for layer in order], "interleaved")
    block_ids = torch.arange(BLOCKS)
    assert shuffled.page_ids(block_ids).equal(straight.page_ids(block_ids)[order])


def test_sizes_and_sharing():
    cache = make_pool(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE)
    pool = cache.pool
    assert (pool.num_layers, pool.num_kv_heads, pool.block_size, pool.head_size) == (3, 2, 16, 16)
    assert pool.pages.shape == (LAYERS * BLOCKS * HEADS, BLOCK_SIZE * 2 * HEAD_SIZE)
    cache.layers[1][4, 1] = 7.0
    assert (pool.pages[cache.page_id(1, 4, 1)] == 7.0).all()
    assert int((pool.pages == 7.0).sum()) == pool.pages.shape[1]


def test_a_cache_of_one_block():
    layers = make_layers(LAYERS, HEADS, 1, BLOCK_SIZE, HEAD_SIZE, "LBHNC")
    page_ids = PagePool.from_layers(layers, "transposed").page_ids(torch.tensor([0]))
    assert page_ids.flatten().tolist() == list(range(LAYERS * HEADS))


def test_layers_in_different_allocations_are_refused():
    layers = make_layers(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE, "LBHNC")
    with pytest.raises(ValueError, match="kv_caches: expected all layers in one allocation"):
        PagePool.from_layers([layers[0], layers[1].clone()], "transposed")


def _with_padded_slots(layers):
    padded = torch.zeros(BLOCKS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE + 1)
    return [padded[..., :-1]]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_with_padded_slots, id="slots with gaps"),
        pytest.param(lambda layers: [layer.transpose(1, 2) for layer in layers], id="tokens outside heads"),
        pytest.param(lambda layers: [layer.transpose(2, 3) for layer in layers], id="page transposed"),
        pytest.param(lambda layers: [layers[0], layers[1][:, :1]], id="fewer heads in a layer"),
        pytest.param(lambda layers: [layers[0], layers[1][:-1]], id="fewer blocks in a layer"),
        pytest.param(lambda layers: [layers[0], layers[1][::2]], id="another block stride"),
    ],
)
def test_wrong_strides_are_refused(change):
    layers = make_layers(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE, "BLHNC")
    with pytest.raises(ValueError, match=r"kv_caches: expected pages of shape .* with strides .*, got .* with"):
        PagePool.from_layers(change(layers), "transposed")


@pytest.mark.parametrize("offset, block_gap", [(3, 0), (0, 3)], ids=["layer", "block"])
def test_unaligned_starts_are_refused(offset, block_gap):
    page = BLOCK_SIZE * 2 * HEAD_SIZE
    storage = torch.zeros(2 * BLOCKS * HEADS * page)
    strides = (HEADS * page + block_gap, page, 2 * HEAD_SIZE, 1)
    layer = storage.as_strided((BLOCKS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE), strides, offset)
    with pytest.raises(ValueError, match=f"kv_caches: expected layers and blocks to start at multiples .*{page}"):
        PagePool.from_layers([layer], "transposed")


def test_unknown_packing_is_refused():
    layers = make_layers(LAYERS, HEADS, BLOCKS, BLOCK_SIZE, HEAD_SIZE, "LBHNC")
    with pytest.raises(ValueError, match="packing: expected 'transposed', 'interleaved' or 'tiled', got 'nhd'"):
        PagePool.from_layers(layers, "nhd")
