"""paged_attention against plain torch: xformers' kernel on a GPU where there is one, else in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch

from tests.gpu import HAS_GPU, on_gpu
from vllm_kvevict.kernels import optional_xformers
from vllm_kvevict.kernels.paged_attention import PagedRows, paged_attention, paged_attention_reference

SCALE = 0.2


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch):
    if not optional_xformers.HAS_XFORMERS:
        pytest.skip("xformers is not installed")
    if not HAS_GPU:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # of which it asks

    def attend(query, keys, values, page_table, kv_lens):
        rows = PagedRows.of(*page_table.shape, keys.shape[1], query.device)
        return paged_attention(query, keys, values, page_table, kv_lens, SCALE, rows)

    return on_gpu(attend) if HAS_GPU else attend


def make_inputs(kv_lens, block_size, num_heads, head_size, dtype):
    """Pages with K and V side by side, of which only what a row holds is no NaN."""
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    max_pages = -(-max(kv_lens) // block_size) + 1
    pages = torch.full((len(kv_lens) * max_pages + 3, block_size, 2 * head_size), float("nan"), dtype=dtype)
    table = torch.randperm(len(pages))[: len(kv_lens) * max_pages].view(len(kv_lens), -1)
    for row, kv_len in enumerate(kv_lens):
        tokens = torch.arange(kv_len)
        pages[table[row, tokens // block_size], tokens % block_size] = torch.randn(kv_len, 2 * head_size).to(dtype)
    query = torch.randn(len(kv_lens), num_heads, head_size).to(dtype)
    return query, *pages.split(head_size, dim=2), table.int(), lens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kv_lens, block_size, num_heads, head_size",
    [((1,), 16, 1, 16), ((1, 16, 17, 80, 33, 64), 16, 3, 32), ((300, 5), 64, 4, 128), ((130, 96, 1), 32, 8, 64)],
)
def test_equals_the_definition(attention, kv_lens, block_size, num_heads, head_size, dtype):
    if dtype == torch.bfloat16 and not HAS_GPU:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    inputs = make_inputs(kv_lens, block_size, num_heads, head_size, dtype)
    # probabilities are rounded to the dtype before they meet the values
    tolerance = {"rtol": 0, "atol": 2e-3 if dtype == torch.float16 else 2e-2}
    torch.testing.assert_close(attention(*inputs), paged_attention_reference(*inputs, SCALE), **tolerance)


@pytest.mark.parametrize(("dtype", "head_size"), [(torch.float32, 16), (torch.float16, 40)])
def test_what_the_kernel_does_not_take(dtype, head_size):
    inputs = make_inputs((5,), 16, 2, head_size, dtype)
    with pytest.raises(ValueError, match=f"got {dtype} and {head_size}"):
        paged_attention(*inputs, SCALE, None)


def test_without_xformers_its_use_is_an_error_that_says_what_to_install():
    code = """
import sys
sys.modules["xformers"] = None
import torch
from vllm_kvevict.kernels.paged_attention import PagedRows
PagedRows.of(1, 1, 16, torch.device("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: xformers is not installed; install it with `pip install vllm-kvevict[xformers]`" in done.stderr
