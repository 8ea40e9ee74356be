"""What a decoder layer of a source is given as its mask, for windows that start at position 0."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import AttentionGeometry


def layer_mask(length: int, geometry: AttentionGeometry, additive: bool, device: torch.device) -> Tensor | None:
    """The mask ``[1, 1, S, S]`` of a layer, for PyTorch's fused attention or for plain attention.

    Args:
        length: S, tokens of a window.
        geometry: of the layer; it says how far back a query sees.
        additive: float32, what plain attention adds to scores. Otherwise bool, True where a query sees a key, and None
            where causality alone decides, which the fused attention knows by itself.
        device: where it lies.
    """
    window = geometry.sliding_window
    if (window is None or window >= length) and not additive:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    visible = (distance >= 0) & (distance < (window or length))
    if not additive:
        return visible[None, None]
    return torch.zeros(1, 1, length, length, device=device).masked_fill(~visible, torch.finfo(torch.float32).min)
