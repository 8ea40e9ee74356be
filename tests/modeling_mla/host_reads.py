"""Finds what waits for a device: under the capture of a CUDA graph it would be an error."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

_READS = tuple(
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist")
)
"""What a host has to wait for: values for Python, or a tensor whose size hangs on values."""


class NoHostReads(TorchFunctionMode):
    """Raises where a tensor's values are read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in _READS, f"{func} reads a tensor's values"
        return func(*args, **(kwargs or {}))
