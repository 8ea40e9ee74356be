"""Zeros that a projection gets at the ends of its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_parts(tensor: Tensor, dim: int, parts: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros behind each of the parts of a dimension, given as (size, padded size), of a tensor of any shape."""
    padded = []
    for part, (size, wanted) in zip(tensor.split([size for size, _ in parts], dim=dim), parts, strict=True):
        shape = list(tensor.shape)
        shape[dim] = wanted - size
        padded += [part, tensor.new_zeros(shape)]
    return torch.cat(padded, dim=dim)


def placed_pairs(rows: Tensor, dim: int, places: Sequence[int], pairs: int) -> Tensor:
    """Half-split rotary channels as interleaved ones at their places in a wider table, zeros elsewhere.

    Args:
        rows: of any shape; real parts of its pairs, then imaginary parts, along ``dim``.
        dim: of the channels.
        places: of each pair in the table.
        pairs: of the table.

    Returns:
        ``2 * pairs`` channels along ``dim``, pair ``i`` at ``(2i, 2i+1)``.
    """
    moved = rows.movedim(dim, 0)
    wide = moved.new_zeros(2 * pairs, *moved.shape[1:])
    first = 2 * torch.tensor(places, dtype=torch.long, device=rows.device)
    wide[first], wide[first + 1] = moved.chunk(2)
    return wide.movedim(0, dim)
