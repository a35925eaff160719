"""Tensors that the host makes, for the device: copied without a wait."""

from __future__ import annotations

import torch


def to_device(made_here: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor on ``device``; a GPU copies it from pinned memory, while the host goes on."""
    if device.type == "cpu":
        return made_here
    return made_here.pin_memory().to(device, non_blocking=True)
