"""Attention of OLMo 2 and 3: norms over the whole projection, rotation in float32.

A norm over all heads is one function of the hidden state as any other: keys are normalised before they are cached, at
no cost. Split over processes, each makes all of the query and keeps its own heads.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from typing_extensions import override

from .qk_norm_mla import NormedMLAttention
from .rope_mla import MLARotaryEmbedding


class OlmoMLAttention(NormedMLAttention):
    """`NormedMLAttention` with one norm over all heads of a projection; it rotates in the dtype of the angles."""

    norm_spans_heads = True

    @override
    def make_norm(self, heads: int) -> nn.Module:
        return Olmo2RMSNorm(heads * self.norm_dim, eps=self.config.rms_norm_eps)

    @override
    def apply_norm(self, norm: nn.Module, projected: torch.Tensor) -> torch.Tensor:
        return norm(projected).unflatten(-1, (-1, self.norm_dim))

    @override
    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return super().rotate(x, cos, sin).to(x.dtype)


class OlmoMLARotaryEmbedding(MLARotaryEmbedding):
    """`MLARotaryEmbedding` whose cosines and sines stay in float32."""

    @override
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x.new_empty(0, dtype=torch.float32), position_ids, layer_type)
