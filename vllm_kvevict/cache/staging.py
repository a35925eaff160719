"""How numbers that the host knows get to the device without anybody waiting for it, and how others come back."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return ``values`` as a tensor on ``device``, in the order of its work: the host does not wait for the copy.

    On the CPU it is the same memory, which must not be changed any more.
    """
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps pinned memory until the copy is through


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU: here the host waits until the device has made it."""
    return tensor.cpu()


def on_host(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return float32 memory of the host with which ``device`` exchanges tiles without anybody waiting."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
