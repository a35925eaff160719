"""move_tokens moves exactly what it is told to, for every implementation that can run here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu import HAS_GPU, on_gpu
from tests.kernels import cuda_emulation
from vllm_kvevict.kernels import move_tokens as module
from vllm_kvevict.kernels.move_tokens import move_tokens, move_tokens_reference
from vllm_kvevict.kernels.native import cuda_library, library
from vllm_kvevict.kernels.optional_triton import tl


def move_tokens_narrow(*arguments: torch.Tensor) -> None:
    """What machines without AVX-512 run."""
    kernels = library()
    kernels.kvevict_limit_lanes(4)
    try:
        move_tokens(*arguments)
    finally:
        kernels.kvevict_limit_lanes(16)


IS_BUILT = pytest.mark.skipif(
    library() is None, reason="the CPU kernels are not built: run `python setup.py build_ext --inplace`"
)
# without a GPU Triton interprets its kernel, and the CUDA kernel is emulated
USES_GPU = HAS_GPU and cuda_library() is not None
IMPLEMENTATIONS = [
    pytest.param(move_tokens_reference, id="reference"),
    pytest.param(move_tokens, id="native", marks=IS_BUILT),
    pytest.param(move_tokens_narrow, id="native-4", marks=IS_BUILT),
    pytest.param(
        on_gpu(module.move_tokens_triton) if HAS_GPU else module.move_tokens_triton,
        id="triton",
        marks=pytest.mark.skipif(tl is None, reason="Triton is not installed"),
    ),
    pytest.param(
        on_gpu(module.move_tokens_cuda) if USES_GPU else cuda_emulation.move_tokens,
        id="cuda",
        marks=pytest.mark.skipif(
            not USES_GPU and cuda_emulation.COMPILER is None, reason="needs a C++ compiler to emulate the kernel"
        ),
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]


def make_pool(num_pages, block_size, head_size, dtype, packing, generator):
    """Random bits, NaN patterns among them: (storage as bytes, keys, values), K and V sharing each page."""
    page_elements = block_size * head_size
    page_bytes = 2 * page_elements * dtype.itemsize
    storage = torch.randint(0, 256, (num_pages, page_bytes), generator=generator, dtype=torch.uint8)
    elements = storage.view(dtype)
    if packing == "transposed":
        keys = elements[:, :page_elements].view(num_pages, head_size, block_size).transpose(1, 2)
        values = elements[:, page_elements:].view(num_pages, block_size, head_size)
    else:
        interleaved = elements.view(num_pages, block_size, 2 * head_size)
        keys, values = interleaved[:, :, :head_size], interleaved[:, :, head_size:]
    return storage, keys, values


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("move", IMPLEMENTATIONS)
@pytest.mark.parametrize("packing", ["plain", "transposed"])
@settings(max_examples=40, deadline=None)
@given(
    num_pages=st.integers(2, 12),
    block_size=st.sampled_from([1, 16, 32, 64]),
    head_size=st.sampled_from([1, 40, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_moves_exactly(move, packing, num_pages, block_size, head_size, dtype, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    storage, keys, values = make_pool(num_pages, block_size, head_size, dtype, packing, generator)
    slots = torch.randperm(num_pages * block_size, generator=generator)
    num_tokens = max(int(fraction * (slots.numel() // 2)), 1)  # of none, the launcher launches nothing
    destination = slots[:num_tokens].contiguous()
    # sources may repeat: one token copied to two places is not forbidden
    source = slots[torch.randint(num_tokens, slots.numel(), (num_tokens,), generator=generator)]

    expected_storage = storage.clone()
    offset = keys.storage_offset(), values.storage_offset()
    expected = [
        bits(expected_storage.view(dtype).as_strided(pool.shape, pool.stride(), at))
        for pool, at in zip((keys, values), offset, strict=True)
    ]
    for old, new in zip(source.tolist(), destination.tolist(), strict=True):
        for pool in expected:
            pool[new // block_size, new % block_size] = pool[old // block_size, old % block_size].clone()

    move(keys, values, source, destination)
    assert storage.equal(expected_storage)


@pytest.mark.parametrize("move", IMPLEMENTATIONS)
@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES[1:4:2], ids=str)
@pytest.mark.parametrize("block_size", [8, 24, 32, 96])
def test_moves_between_few_pages(move, packing, dtype, block_size):
    """As a compaction does: survivors in ascending order fill the holes of other pages."""
    generator = torch.Generator().manual_seed(block_size)
    _, keys, values = make_pool(6, block_size, 16, dtype, packing, generator)
    half = 3 * block_size
    source = torch.randperm(half, generator=generator)[: half // 2].sort().values
    destination = half + torch.randperm(half, generator=generator)[: half // 2].sort().values
    expected_keys, expected_values = bits(keys).clone(), bits(values).clone()
    for pool in (expected_keys, expected_values):
        tokens = pool.flatten(0, 1)
        tokens[destination] = tokens[source]
        pool.copy_(tokens.view_as(pool))
    move(keys, values, source, destination)
    assert bits(keys).equal(expected_keys)
    assert bits(values).equal(expected_values)


@pytest.mark.parametrize("move", IMPLEMENTATIONS)
@pytest.mark.parametrize("packing", ["plain", "transposed"])
def test_gaps_move_nothing(move, packing):
    """Gaps at both ends, in runs, and between neighbours of one page."""
    generator = torch.Generator().manual_seed(3)
    storage, keys, values = make_pool(8, 32, 16, torch.bfloat16, packing, generator)
    slots = torch.arange(256).view(2, 128)
    is_gap = torch.rand(128, generator=generator) < 0.4
    is_gap[[0, 1, 63, 64, 126, 127]] = True
    source, destination = slots.masked_fill(is_gap, -1).contiguous()
    expected = storage.clone()
    reference = [
        expected.view(torch.bfloat16).as_strided(pool.shape, pool.stride(), pool.storage_offset())
        for pool in (keys, values)
    ]
    move_tokens_reference(*reference, source[~is_gap].contiguous(), destination[~is_gap].contiguous())
    move(keys, values, source, destination)
    assert storage.equal(expected)
    for gaps in ((source[is_gap], destination[is_gap] + 7), (source[is_gap] + 7, destination[is_gap])):
        move(keys, values, *gaps)
    assert storage.equal(expected)


def test_nothing_to_move():
    keys, none = torch.randn(4, 16, 8), torch.empty(0, dtype=torch.int64)
    expected = keys.clone()
    move_tokens(keys, keys, none, none)
    assert keys.equal(expected)


@pytest.mark.parametrize("move", IMPLEMENTATIONS)
def test_values_may_have_another_head_size(move):
    keys, values = torch.randn(4, 16, 64), torch.randn(4, 16, 32)
    expected_key, expected_value = keys[0, 3].clone(), values[0, 3].clone()
    move(keys, values, torch.tensor([3]), torch.tensor([2 * 16 + 5]))
    assert keys[2, 5].equal(expected_key)
    assert values[2, 5].equal(expected_value)


def test_reference_without_library(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: None)
    keys, values = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    expected = keys[0, 1].clone()
    move_tokens(keys, values, torch.tensor([1]), torch.tensor([20]))
    assert keys[1, 4].equal(expected)


POOL = torch.zeros(4, 16, 8)
SLOTS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((POOL[0], POOL, SLOTS, SLOTS), "`keys`: expected .num_pages, block_size, head_size., got shape .16, 8."),
        ((POOL.double(), POOL, SLOTS, SLOTS), "`keys`: expected elements of 1, 2 or 4 bytes, got torch.float64"),
        ((POOL, POOL[:3], SLOTS, SLOTS), "`values`: expected .4, 16, head_size., got shape .3, 16, 8."),
        ((POOL, POOL.half(), SLOTS, SLOTS), "`values`: expected elements of 4 bytes on cpu, got torch.float16"),
        ((POOL, POOL, SLOTS.int(), SLOTS), "`source`: expected int64 on cpu, got torch.int32"),
        ((POOL, POOL, SLOTS, torch.arange(4)[::2]), "`destination`: expected contiguous slots"),
        ((POOL, POOL, SLOTS, SLOTS[:1]), "`destination`: expected as many slots as `source` .2., got 1"),
        ((POOL, POOL, SLOTS - 3, SLOTS), "`source`: expected slots -1 to 63, got -2 to -1"),
        ((POOL, POOL, SLOTS, SLOTS + 62), "`destination`: expected slots -1 to 63, got 63 to 64"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        move_tokens(*arguments)
