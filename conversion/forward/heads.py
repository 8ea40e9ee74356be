"""What every method does with heads and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import AttentionGeometry, AttentionWeights


def repeat_groups(geometry: AttentionGeometry, rows: Tensor) -> Tensor:
    """From one block of ``d`` rows for each kv head, ``[n_kv*d, ...]``, to one for each query head, ``[H*d, ...]``."""
    blocks = rows.unflatten(0, (geometry.num_kv_heads, geometry.head_dim))
    return blocks.repeat_interleave(geometry.num_key_value_groups, dim=0).flatten(0, 1)


def constants_cancel(geometry: AttentionGeometry, weights: AttentionWeights) -> bool:
    """Whether a constant in an un-rotated key is lost on the softmax: it adds the same to every score of a row.

    A softcap does not let it through unchanged, and a sink has a score without it.
    """
    return geometry.softcap is None and weights.sinks is None


def value_bias_through_output(geometry: AttentionGeometry, weights: AttentionWeights) -> Tensor | None:
    """The output bias ``[D]`` of a layer whose values have lost theirs: attention weights sum to one.

    Not beside sinks, where the values must keep their bias, and the output has its own.
    """
    if weights.v_bias is None or weights.sinks is not None:
        return weights.o_bias
    moved = weights.o @ repeat_groups(geometry, weights.v_bias)
    return moved if weights.o_bias is None else moved + weights.o_bias


def augmented_rows(weight: Tensor, bias: Tensor | None, head_dim: int) -> Tensor:
    """Weight rows by head with the bias as a last column, ``[heads, d, D+1]`` in float64: maps of ``x~ = [x, 1]``."""
    constant = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return torch.cat((weight, constant[:, None]), dim=1).double().unflatten(0, (-1, head_dim))
