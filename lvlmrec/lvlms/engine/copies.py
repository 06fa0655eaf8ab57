"""Tensors on their way from the host to the device of a model."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on the CPU, in pinned memory where `device` is a GPU: its copy then needs no waiting."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor that `to_host` prepared, on `device`."""
    return tensor.to(device, non_blocking=True)
