"""Copies between the host and the device: those that wait for it are made here, and no other."""

from __future__ import annotations

import torch


def to_device(made_here: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor on ``device``; a GPU copies it from pinned memory, while the host goes on."""
    if device.type == "cpu":
        return made_here
    return made_here.pin_memory().to(device, non_blocking=True)


def to_host(made_there: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU; if it is on a GPU, the host waits until it is made."""
    return made_there.cpu()
