"""What SnapKV and its descendants share: the pool, against torch's own, and how many layers are scored together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.policies.test_contract import make_inputs
from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies import scratch, window
from vllm_kvevict.policies.base import ScoreInputs
from vllm_kvevict.policies.snapkv import SnapKV
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


@pytest.mark.parametrize(("most", "together"), [(2**25, [5]), (2 * 8 * 300, [2, 1, 2]), (1, [1] * 5)])
def test_as_many_layers_are_scored_together_as_fit(
    most: int, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bytes a token: a float for each of two KV heads."""
    inputs = [make_inputs(SnapKV(), 300, content_seed=seed)[0] for seed in range(5)]
    expected = [SnapKV().score(of_layer) for of_layer in inputs]
    found, score = [], ScoreInputs.window_scores_of_layers

    def recorded(layers: list[ScoreInputs], reduction: Reduction) -> torch.Tensor:
        found.append(len(layers))
        return score(layers, reduction)

    pool = torch.cat([of_layer.keys for of_layer in inputs]), torch.cat([of_layer.values for of_layer in inputs])
    first_pages = [sum(len(before.keys) for before in inputs[:place]) for place in range(5)]
    layers = [
        replace(of_layer, keys=pool[0], values=pool[1], page_table=of_layer.page_table + first)
        for of_layer, first in zip(inputs, first_pages, strict=True)
    ]
    monkeypatch.setattr(scratch, "MOST_BYTES", most)
    monkeypatch.setattr(ScoreInputs, "window_scores_of_layers", staticmethod(recorded))
    scores = SnapKV().score_layers(layers)
    assert found == together
    assert all(one.equal(other) for one, other in zip(scores, expected, strict=True))
