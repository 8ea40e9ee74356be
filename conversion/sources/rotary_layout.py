"""Rotary pairs that lie side by side, put where every method expects them: half-split."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layers import AttentionGeometry, AttentionWeights


def half_split(geometry: AttentionGeometry, weights: AttentionWeights) -> AttentionWeights:
    """The same attention with pairs ``(f, f + rotary_dim / 2)`` of every head, from pairs ``(2f, 2f + 1)``.

    Scores do not depend on the order of a head's channels, if queries and keys share it.
    """
    channels = torch.arange(geometry.head_dim, device=weights.q.device)
    rotary, passive = channels.split((geometry.rotary_dim, geometry.head_dim - geometry.rotary_dim))
    order = torch.cat((rotary[0::2], rotary[1::2], passive))

    def reordered(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, geometry.head_dim))[:, order].flatten(0, 1)

    return replace(
        weights,
        q=reordered(weights.q),
        k=reordered(weights.k),
        q_bias=None if weights.q_bias is None else reordered(weights.q_bias),
        k_bias=None if weights.k_bias is None else reordered(weights.k_bias),
    )
