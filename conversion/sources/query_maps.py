"""A converted layer's query map as the source's own, and a small matrix a head behind it.

Every head of a converted layer meets all rotary channels of the cache, at a generous size as many as all key/value
heads of the source rotate, and yet its query is a linear map of the source's, of a head's few channels. As one matrix
``[H*(d_n+d_r), D]`` that would be several times the source's ``[H*d, D]``; as two it is hardly more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import AttentionGeometry, AttentionWeights, MLAWeights

_WORTH = 1.5
"""Times as many weights in one matrix, from which on a further operator a layer is worth its time."""


def head_dim_of_queries(geometries: Sequence[AttentionGeometry], widths: Sequence[int]) -> int | None:
    """Channels of a head's query in front of its own map, or None where one matrix a layer is as good.

    Args:
        geometries: of the source's layers.
        widths: ``d_n + d_r`` of every converted layer.
    """
    (dim,) = {geometry.head_dim for geometry in geometries}
    if any(geometry.behind_norms for geometry in geometries):
        # There the map of every head is that of the family's attention.
        return None
    hidden, heads = geometries[0].hidden_size, geometries[0].num_heads
    one = sum(widths) * heads * hidden
    two = len(widths) * heads * dim * hidden + sum(widths) * heads * dim
    return dim if one >= _WORTH * two else None


def head_maps(source: AttentionWeights, converted: MLAWeights, heads: int) -> Tensor:
    """The maps ``M [H, d_n + d_r, d]`` by which queries of ``source`` become those of ``converted``, biases included.

    Args:
        source: with ``q [H*d, D]``.
        converted: with ``q_proj [H*(d_n+d_r), D]``, whose rows are combinations of those of the same head of ``q``.
        heads: ``H``.
    """

    def by_head(rows: Tensor, bias: Tensor | None) -> Tensor:
        joined = rows if bias is None else torch.cat((rows, bias[:, None]), dim=1)
        return joined.double().unflatten(0, (heads, -1))

    before, after = by_head(source.q, source.q_bias), by_head(converted.q_proj, converted.q_proj_bias)
    return after @ before.to(after.device).pinverse()
