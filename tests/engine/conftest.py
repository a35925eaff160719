"""What engine tests share."""

from __future__ import annotations

import pytest
import torch

from vllm_kvevict import evictor


@pytest.fixture
def kept_masks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Collects what every eviction kept, [num_layers, num_kv_heads, num_tokens] bool, in order."""
    masks: list[torch.Tensor] = []
    select = evictor.select

    def spy(scores: torch.Tensor, num_kept: torch.Tensor) -> torch.Tensor:
        masks.append(select(scores, num_kept))
        return masks[-1]

    monkeypatch.setattr(evictor, "select", spy)
    return masks
