"""What every method does with heads and biases."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConversionError
from ..layers import AttentionGeometry, AttentionWeights


def refuse_qk_norms(weights: AttentionWeights, method: str) -> None:
    """Raises `ConversionError` for a source that normalises queries or keys per head (Qwen3)."""
    if weights.q_norm is not None or weights.k_norm is not None:
        raise ConversionError(
            f"this source normalises queries and keys per head (q_norm, k_norm), which method {method} cannot convert "
            "yet; choose a model without them."
        )


def repeat_groups(geometry: AttentionGeometry, rows: Tensor) -> Tensor:
    """From one block of ``d`` rows for each kv head, ``[n_kv*d, ...]``, to one for each query head, ``[H*d, ...]``."""
    blocks = rows.unflatten(0, (geometry.num_kv_heads, geometry.head_dim))
    return blocks.repeat_interleave(geometry.num_groups, dim=0).flatten(0, 1)


def value_bias_through_output(geometry: AttentionGeometry, weights: AttentionWeights) -> Tensor | None:
    """The output bias ``[D]`` of a layer whose values have lost theirs: attention weights sum to one."""
    if weights.v_bias is None:
        return weights.o_bias
    moved = weights.o @ repeat_groups(geometry, weights.v_bias)
    return moved if weights.o_bias is None else moved + weights.o_bias
