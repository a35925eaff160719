"""The whole rows of a batch keep what is theirs, in every field of vLLM's description of it."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.engine.versions import UnsupportedVLLMError
from vllm_kvevict.engine.worker import whole_rows as module
from vllm_kvevict.engine.worker.rows import WholeRows
from vllm_kvevict.engine.worker.whole_rows import CLASSIFIED, check_fields, whole_rows

QUERY_LENS = [1, 4, 2, 1, 3]
WHOLE = [1, 3, 4]


def tokens_of(rows: list[int]) -> list[int]:
    starts = [sum(QUERY_LENS[:row]) for row in rows]
    return [start + place for row, start in zip(rows, starts, strict=True) for place in range(QUERY_LENS[row])]


def batch() -> CommonAttentionMetadata:
    """Every field is set, and every number of it says which row or token it belongs to."""
    num_reqs, num_tokens = len(QUERY_LENS), sum(QUERY_LENS)
    starts = torch.tensor([0, *np.cumsum(QUERY_LENS)], dtype=torch.int32)
    rows, tokens = torch.arange(num_reqs, dtype=torch.int32), torch.arange(num_tokens)
    values: dict[str, Any] = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": 100 + rows,
        "num_reqs": num_reqs,
        "num_actual_tokens": num_tokens,
        "max_query_len": max(QUERY_LENS),
        "max_seq_len": 104,
        "block_table_tensor": rows[:, None] * 10 + torch.arange(3, dtype=torch.int32),
        "slot_mapping": 1000 + tokens,
        "causal": 200 + rows,
        "logits_indices_padded": tokens,
        "num_logits_indices": 7,
        "max_logits_per_req": 3,
        "encoder_seq_lens": 300 + rows,
        "encoder_seq_lens_cpu": 300 + rows.numpy(),
        "dcp_local_seq_lens": 400 + rows,
        "dcp_local_seq_lens_cpu_upper_bound": 500 + rows,
        "positions": 2000 + tokens,
        "is_prefilling": rows % 2 == 1,
        "seq_lens_cpu_upper_bound": 600 + rows,
        "req_idx": 700 + rows.numpy(),
        "mm_req_doc_ranges": {0: [(0, 1)], 1: [(1, 2)], 4: [(4, 5), (6, 7)]},
        "rswa_prefix_lens": 800 + rows,
        "replayssm_decode_base_cpu": 900 + rows,
        "_num_computed_tokens_cache": rows,
        "_token_to_req_indices_cache": tokens.int(),
    }
    assert values.keys() == {each.name for each in fields(CommonAttentionMetadata)}
    return CommonAttentionMetadata(**values)


EXPECTED: dict[str, Any] = {
    "query_start_loc": [0, 4, 5, 8],
    "query_start_loc_cpu": [0, 4, 5, 8],
    "seq_lens": [101, 103, 104],
    "num_reqs": 3,
    "num_actual_tokens": 8,
    "max_query_len": 4,
    "max_seq_len": 604,  # as far as the host knows
    "block_table_tensor": [[10, 11, 12], [30, 31, 32], [40, 41, 42]],
    "slot_mapping": [1001, 1002, 1003, 1004, 1007, 1008, 1009, 1010],
    "causal": [201, 203, 204],
    "logits_indices_padded": None,
    "num_logits_indices": None,
    "max_logits_per_req": None,
    "encoder_seq_lens": [301, 303, 304],
    "encoder_seq_lens_cpu": [301, 303, 304],
    "dcp_local_seq_lens": [401, 403, 404],
    "dcp_local_seq_lens_cpu_upper_bound": [501, 503, 504],
    "positions": [2001, 2002, 2003, 2004, 2007, 2008, 2009, 2010],
    "is_prefilling": [True, True, False],
    "seq_lens_cpu_upper_bound": [601, 603, 604],
    "req_idx": [701, 703, 704],
    "mm_req_doc_ranges": {0: [(1, 2)], 2: [(4, 5), (6, 7)]},
    "rswa_prefix_lens": [801, 803, 804],
    "replayssm_decode_base_cpu": [901, 903, 904],
    "_num_computed_tokens_cache": None,
    "_token_to_req_indices_cache": None,
}


def whole() -> WholeRows:
    query_lens = np.array(QUERY_LENS)[WHOLE]
    return WholeRows(np.array(WHOLE), torch.tensor(WHOLE), torch.tensor(tokens_of(WHOLE)), query_lens)


def differing_fields() -> set[str]:
    part = whole_rows(batch(), whole())
    found = {each.name: getattr(part, each.name) for each in fields(part)}
    listed = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in found.items()}
    return {name for name in found if listed[name] != EXPECTED[name]}


def test_every_field_has_what_is_of_the_whole_rows() -> None:
    assert not differing_fields()


@pytest.mark.parametrize("name", [*module.BY_ROW, *module.BY_TOKEN, *module.BY_ROW_NUMBER])
def test_a_field_that_is_passed_on_as_it_is_would_be_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for group in ("BY_ROW", "BY_TOKEN", "BY_ROW_NUMBER"):
        monkeypatch.setattr(module, group, tuple(each for each in getattr(module, group) if each != name))
    try:
        assert name in differing_fields()
    except KeyError as error:  # what the lengths are counted from
        assert error.args == (name,)


def test_what_the_runner_left_out_stays_out() -> None:
    left_out = {"is_prefilling", "req_idx", "positions", "mm_req_doc_ranges", "rswa_prefix_lens"}
    common = batch().replace(causal=True, **dict.fromkeys(left_out))
    part = whole_rows(common, whole())
    assert part.causal is True
    assert all(getattr(part, name) is None for name in left_out)


def test_every_field_of_vllm_is_classified_and_no_other() -> None:
    check_fields()
    assert {each.name for each in fields(CommonAttentionMetadata)} == CLASSIFIED


def test_a_field_that_nobody_has_classified_is_refused_by_name() -> None:
    planted = make_dataclass("Planted", [("window_of_row", Any, field(default=None))], bases=(CommonAttentionMetadata,))
    with pytest.raises(UnsupportedVLLMError, match=r"^Planted has window_of_row, which"):
        check_fields(planted)
