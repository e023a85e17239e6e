"""Small tensors for the device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`. From pageable memory a GPU's driver first lets all that was queued before come to its end."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory until the copy is done
    return tensor.to(device)
