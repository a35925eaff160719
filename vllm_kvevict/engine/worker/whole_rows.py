"""The part of a batch that stock attention serves: its whole rows, in every field of vLLM's description of a batch.

A field that nobody has classified here would reach stock attention with the rows of the whole batch, and some of them
would then be those of other requests. ``check_fields`` refuses to start with a vLLM that has one.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.versions import UnsupportedVLLMError
from vllm_kvevict.engine.worker.rows import WholeRows, longest_lens

# [num_reqs, ...], tensors on any device or numpy arrays; None where the model or the runner has none
BY_ROW = (
    "seq_lens",
    "block_table_tensor",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "req_idx",
    "rswa_prefix_lens",
    "replayssm_decode_base_cpu",
    "encoder_seq_lens",
    "encoder_seq_lens_cpu",
    "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound",
    "causal",  # one flag for all rows is kept
)
# of these, the ones that are on the host whatever the device
ON_HOST = frozenset(
    (
        "is_prefilling",
        "seq_lens_cpu_upper_bound",
        "replayssm_decode_base_cpu",
        "encoder_seq_lens_cpu",
        "dcp_local_seq_lens_cpu_upper_bound",
    )
)
# [num_tokens, ...], with padding at their end or without
BY_TOKEN = ("slot_mapping", "positions")
# dictionaries from a row's number to what it has
BY_ROW_NUMBER = ("mm_req_doc_ranges",)
# what follows from the lengths of the rows that are left
COUNTED = ("query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len")
# set for layers that share another one's cache only, which are refused
OF_SHARED_CACHES = ("logits_indices_padded", "num_logits_indices", "max_logits_per_req")
# vLLM's own, filled when they are first asked for
CACHES = ("_num_computed_tokens_cache", "_token_to_req_indices_cache")

CLASSIFIED = frozenset((*BY_ROW, *BY_TOKEN, *BY_ROW_NUMBER, *COUNTED, *OF_SHARED_CACHES, *CACHES))


def check_fields(metadata: type = CommonAttentionMetadata) -> None:
    """Raise UnsupportedVLLMError if vLLM describes a batch by a field that is not classified here."""
    unknown = sorted({field.name for field in fields(metadata)} - CLASSIFIED)
    if unknown:
        raise UnsupportedVLLMError(
            f"{metadata.__name__} has {', '.join(unknown)}, which this vllm_kvevict does not know how to split between "
            f"whole and evicted requests; use a vLLM that it was tested with, or leave --kv-eviction out"
        )


def whole_rows(common: CommonAttentionMetadata, whole: WholeRows) -> CommonAttentionMetadata:
    """Return the description of a batch that has its whole rows only."""
    starts = np.concatenate([np.zeros(1, dtype=np.int64), whole.query_lens.cumsum()]).astype(np.int32)
    parts: dict[str, Any] = {name: _of_rows(name, getattr(common, name), whole) for name in BY_ROW}
    for name in BY_TOKEN:
        value = getattr(common, name)
        parts[name] = None if value is None else value[whole.tokens]
    for name in BY_ROW_NUMBER:
        parts[name] = _of_row_numbers(getattr(common, name), whole.numbers)
    return common.replace(
        **parts,
        **dict.fromkeys((*OF_SHARED_CACHES, *CACHES)),
        query_start_loc=to_device(starts, common.query_start_loc.device),
        query_start_loc_cpu=torch.from_numpy(starts),
        num_reqs=len(whole.numbers),
        num_actual_tokens=len(whole.tokens),
        max_query_len=int(whole.query_lens.max()),
        max_seq_len=int(longest_lens(common)[whole.numbers].max()),
    )


def _of_rows(name: str, value: Any, whole: WholeRows) -> Any:
    if isinstance(value, torch.Tensor):
        is_on_host = name in ON_HOST or value.device != whole.numbers_on_device.device
        return value[torch.from_numpy(whole.numbers) if is_on_host else whole.numbers_on_device]
    if isinstance(value, np.ndarray):
        return value[whole.numbers]
    return value


def _of_row_numbers(value: dict[int, Any] | None, numbers: np.ndarray) -> dict[int, Any] | None:
    if value is None:
        return None
    return {row: value[number] for row, number in enumerate(numbers.tolist()) if number in value}
