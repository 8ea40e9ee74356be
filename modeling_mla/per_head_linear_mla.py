"""A linear map of its own for every head."""

import torch
from torch import nn
from typing_extensions import override

from .transformers_seams_mla import init


class PerHeadLinear(nn.Module):
    """One linear map a head: ``[B, S, H, in] -> [B, S, H, out]``, weight ``[H, out, in]``."""

    def __init__(self, num_heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, out_features, in_features))

    def init_mla_weights(self, std: float) -> None:
        """Draws the weight from a normal distribution of deviation ``std``."""
        init.normal_(self.weight, mean=0.0, std=std)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, out_features, in_features = self.weight.shape
        rows = x.reshape(-1, heads, in_features).transpose(0, 1)
        return torch.bmm(rows, self.weight.mT).transpose(0, 1).reshape(*x.shape[:-1], out_features)
