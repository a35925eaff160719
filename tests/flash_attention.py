"""FlashAttention's paged kernels by their signature: functions that read tensors as the kernels do, and check them.

The signature and what each version allows are those of ``vllm.vllm_flash_attn.flash_attn_interface`` (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

INT32 = torch.int32


def replace_kernels(
    patch: pytest.MonkeyPatch, version: int, as_kernel: Callable[..., Any] = lambda kernel: kernel
) -> None:
    """Let vLLM's backend call these functions, and think that FlashAttention has this version."""
    from vllm.v1.attention.backends import flash_attn

    kernels = {"flash_attn_varlen_func": varlen, "reshape_and_cache_flash": reshape_and_cache}
    for name, kernel in kernels.items():
        patch.setattr(flash_attn, name, as_kernel(kernel), raising=False)
    schedule = torch.zeros(1, dtype=INT32)
    patch.setattr(flash_attn, "get_scheduler_metadata", lambda **_: schedule, raising=False)
    patch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: False)
    patch.setattr(flash_attn, "get_flash_attn_version", lambda **_: version)


def varlen(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    block_table: torch.Tensor,
    softcap: float,
    fa_version: int,
    alibi_slopes: None = None,
    scheduler_metadata: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    dynamic_causal: None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    s_aux: None = None,
    mask_mod: None = None,
    aux_tensors: None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of sequences of any length over paged keys and values; with the log-sum-exp of the logits
    [num_heads, total_q] float32, if that is asked for.

    q, out:       [total_q, num_heads, head_size]
    k, v:         [num_pages, page_size, num_kv_heads, head_size], read by their strides
    cu_seqlens_q: [num_sequences + 1] int32
    seqused_k:    [num_sequences] int32
    block_table:  [num_sequences, max_pages] int32
    """
    num_sequences, (total_q, num_heads, head_size) = len(seqused_k), q.shape
    num_kv_heads, page_size = k.shape[2], k.shape[1]
    assert fa_version in (2, 3)
    assert fa_version == 3 or (scheduler_metadata is None and num_splits <= 1)
    assert causal is True and window_size == [-1, -1]
    assert alibi_slopes is dynamic_causal is s_aux is mask_mod is aux_tensors is None
    assert q_descale is None
    for descale in (k_descale, v_descale):
        assert descale is None or (descale.shape == (num_sequences, num_kv_heads) and bool((descale == 1).all()))
    assert q.dtype == k.dtype == v.dtype == out.dtype and out.shape == q.shape
    assert k.shape == v.shape and k.shape[3] == head_size and num_heads % num_kv_heads == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == out.stride(-1) == 1
    # the kernels load 16 bytes at a time
    for tensor in (k, v):
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        assert tensor.data_ptr() % 16 == 0
    assert page_size % 16 == 0
    assert cu_seqlens_q.dtype == seqused_k.dtype == block_table.dtype == INT32
    assert cu_seqlens_q.shape == (num_sequences + 1,) and cu_seqlens_q.is_contiguous() and seqused_k.is_contiguous()
    assert block_table.shape[0] == num_sequences and block_table.stride(-1) == 1
    starts, lens = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert starts[0] == 0 and starts[-1] <= total_q  # padding follows
    assert max(end - start for start, end in pairwise(starts)) <= max_seqlen_q
    # of a drafter's first pass vLLM says a token less: the kernels divide their labour by it, and read no less for it
    assert max(lens) <= max_seqlen_k + 1 and max(lens) <= block_table.shape[1] * page_size

    group = num_heads // num_kv_heads
    log_sums = torch.full((num_heads, total_q), torch.nan)
    for row, kv_len in enumerate(lens):
        start, end = starts[row], starts[row + 1]
        num_queries = end - start
        if not num_queries:
            continue
        assert num_queries <= kv_len
        pages = block_table[row, : -(-kv_len // page_size)].long()
        assert bool(((pages >= 0) & (pages < len(k))).all())
        keys = k[pages].flatten(0, 1)[:kv_len].repeat_interleave(group, dim=1)  # [kv_len, num_heads, head_size]
        values = v[pages].flatten(0, 1)[:kv_len].repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q[start:end].float(), keys.float()) * softmax_scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        position = torch.arange(kv_len - num_queries, kv_len)
        logits.masked_fill_(torch.arange(kv_len) > position[:, None], -torch.inf)
        log_sums[:, start:end] = logits.logsumexp(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values.float()).to(out.dtype)
    return (out, log_sums) if return_softmax_lse else out


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Write keys and values [num_tokens, num_kv_heads, head_size] to their slots; -1 is no slot.

    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size]
    """
    assert kv_cache_dtype == "auto"
    is_written = slot_mapping >= 0
    slots = slot_mapping[is_written]
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset] = key[: len(slot_mapping)][is_written]
    value_cache[block, offset] = value[: len(slot_mapping)][is_written]
