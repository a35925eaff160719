"""Parts of different lengths, side by side."""

from __future__ import annotations

import pytest
import torch

from vllm_kvevict.cache.ragged import in_own_memory, padded


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("lens", [[2, 3, 0], [4, 3, 5], [2, 7, 1]], ids=str)
def test_parts_are_padded(lens, dim):
    parts = [torch.full((3, length), 1.0 + length) for length in (2, 3, 0)]
    found = padded([part if dim else part.t() for part in parts], lens, dim, -1)
    found = found if dim else found.t()
    for of_part, part, length in zip(found.split(lens, dim=1), parts, lens, strict=True):
        assert of_part[:, : part.shape[1]].equal(part)
        assert of_part[:, part.shape[1] :].equal(torch.full((3, length - part.shape[1]), -1.0))


def test_a_single_part_is_copied():
    part = torch.zeros(3, 2)
    padded([part], [2], 1).fill_(1.0)
    assert not part.any()


def test_copies_share_no_memory():
    parts = torch.randn(3, 10).bfloat16().split([2, 0, 8], dim=1)
    copies = in_own_memory(parts)
    assert all(copy.equal(part) for copy, part in zip(copies, parts, strict=True))
    assert [copy.untyped_storage().nbytes() for copy in copies] == [12, 0, 48]
