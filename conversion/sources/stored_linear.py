"""A model's head as it is stored: a vocabulary in float32 is large."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

_VALUES = 2**24
"""Values of the weight that are in float32 at a time."""


class StoredLinear(nn.Module):
    """A linear map without bias whose weight ``[V, D]`` stays as it is stored. It computes in float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    @override
    def forward(self, states: Tensor) -> Tensor:
        rows = self.weight.split(max(1, _VALUES // self.weight.shape[1]))
        return torch.cat([nn.functional.linear(states, part.float()) for part in rows], dim=-1)
