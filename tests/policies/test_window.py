"""What SnapKV and its descendants share: the pool, against torch's own, and how many layers are scored together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vllm_kvevict.policies import window
from vllm_kvevict.policies.window import pool_in_place


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 32, 100])
@pytest.mark.parametrize("width", [1, 3, 7, 41])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_pooling_tile_by_tile_is_pooling(
    pool: str, width: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a neighbourhood is wider than a tile, and in a view of a larger tensor; bit by bit."""
    monkeypatch.setattr(window, "_POOL_TILE", 16)
    scores = torch.randn(3, num_tokens + 2)
    part, beside = scores[:, 1:-1], scores[:, [0, -1]].clone()
    pool1d = F.max_pool1d if pool == "max" else F.avg_pool1d
    expected = pool1d(part.clone(), width, stride=1, padding=width // 2)
    pool_in_place(part, pool, width)
    assert part.equal(expected)
    assert scores[:, [0, -1]].equal(beside)
