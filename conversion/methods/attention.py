"""Attention of a source layer and of its converted form, in plain PyTorch, for any sampled query rows of a window.

The methods measure with these; the model itself has its own attention. Windows start at position 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import AttentionGeometry, AttentionWeights, MLAWeights, encoder_input, query_input


@dataclass(frozen=True)
class Rotation:
    """cos and sin, ``[S, pairs]`` each, times the attention factor (RoFormer, arXiv 2104.09864, section 3.2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, inv_freq: Tensor, length: int, attention_factor: float = 1.0) -> Rotation:
        """For positions ``0 .. length - 1``; angles are formed in float32, as models do."""
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq.float()
        return cls(angles.cos() * attention_factor, angles.sin() * attention_factor)

    def apply(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Rotates the first ``2 * pairs`` channels of ``states [..., S, d]``, pair ``f`` being ``(f, f + pairs)``."""
        cos, sin = (self.cos, self.sin) if rows is None else (self.cos[rows], self.sin[rows])
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
        pairs = cos.shape[-1]
        real, imaginary, passive = states.split((pairs, pairs, states.shape[-1] - 2 * pairs), dim=-1)
        return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin, passive), dim=-1)


def causal_softmax(scores: Tensor, rows: Tensor, sliding_window: int | None) -> Tensor:
    """Attention weights ``[H, n, S]`` of query positions ``rows [n]`` from their scores against all S positions."""
    columns = torch.arange(scores.shape[-1])
    hidden = columns > rows[:, None]
    if sliding_window is not None:
        hidden |= columns <= rows[:, None] - sliding_window
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)


@dataclass(frozen=True)
class SourceHeads:
    """One window through the source's projections: queries and keys not yet rotated.

    ``queries [H, n, d]`` at the sampled rows, ``keys`` and ``values [n_kv, S, d]``.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


def source_heads(geometry: AttentionGeometry, weights: AttentionWeights, inputs: Tensor, rows: Tensor) -> SourceHeads:
    """Projects the attention input ``inputs [S, D]`` of one window; ``rows [n]`` are the query positions."""

    def heads(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(states, weight, bias).unflatten(-1, (-1, geometry.head_dim)).transpose(0, 1)

    return SourceHeads(
        queries=heads(query_input(inputs[rows], weights.q), weights.q, weights.q_bias),
        keys=heads(encoder_input(inputs, weights.k), weights.k, weights.k_bias),
        values=heads(encoder_input(inputs, weights.v), weights.v, weights.v_bias),
    )


def source_attention(geometry: AttentionGeometry, heads: SourceHeads, rows: Tensor) -> Tensor:
    """The source's attention weights ``[H, n, S]``."""
    rotation = Rotation.of(geometry.inv_freq, heads.keys.shape[1], geometry.attention_factor)
    queries, keys = rotation.apply(heads.queries, rows), rotation.apply(heads.keys)
    grouped = (queries * geometry.softmax_scale).unflatten(0, (geometry.num_kv_heads, -1)).flatten(1, 2)
    scores = (grouped @ keys.mT).unflatten(1, (geometry.num_groups, -1)).flatten(0, 1)
    return causal_softmax(scores, rows, geometry.sliding_window)


def attended(geometry: AttentionGeometry, attention: Tensor, values: Tensor) -> Tensor:
    """Contexts ``[H, n, d]``: what the heads gather from their group's ``values [n_kv, S, d]``."""
    grouped = attention.unflatten(0, (geometry.num_kv_heads, -1)).flatten(1, 2)
    return (grouped @ values).unflatten(1, (geometry.num_groups, -1)).flatten(0, 1)


def source_output(geometry: AttentionGeometry, weights: AttentionWeights, inputs: Tensor, rows: Tensor) -> Tensor:
    """What the source's attention block adds to the residual stream at the sampled rows, ``[n, D]``."""
    heads = source_heads(geometry, weights, inputs, rows)
    attention = source_attention(geometry, heads, rows)
    context = attended(geometry, attention, heads.values).transpose(0, 1).flatten(1)
    return torch.nn.functional.linear(context, weights.o, weights.o_bias)


def converted_contexts(geometry: AttentionGeometry, weights: MLAWeights, inputs: Tensor, rows: Tensor) -> Tensor:
    """Per-head contexts of the converted layer, side by side: what its ``o_proj`` reads, ``[n, H*d_v]``."""
    nope, v_dim, pairs = weights.qk_nope_head_dim, weights.v_head_dim, weights.inv_freq.numel()
    heads = geometry.num_heads
    read = query_input(inputs[rows], weights.q_proj)
    query = torch.nn.functional.linear(read, weights.q_proj, weights.q_proj_bias)
    q_nope, q_rope = query.unflatten(-1, (heads, -1)).transpose(0, 1).split((nope, 2 * pairs), dim=-1)
    read = encoder_input(inputs, weights.kv_a_proj_with_mqa)
    cached = torch.nn.functional.linear(read, weights.kv_a_proj_with_mqa, weights.kv_a_proj_with_mqa_bias)
    latent, key_rope = cached.split((cached.shape[-1] - 2 * pairs, 2 * pairs), dim=-1)
    up_key, up_value = weights.kv_b_proj.unflatten(0, (heads, nope + v_dim)).split((nope, v_dim), dim=1)

    rotation = Rotation.of(weights.inv_freq, inputs.shape[0], geometry.attention_factor)
    queries = torch.cat((q_nope @ up_key, rotation.apply(q_rope, rows)), dim=-1) * geometry.softmax_scale
    scores = queries @ torch.cat((latent, rotation.apply(key_rope)), dim=-1).T
    attention = causal_softmax(scores, rows, geometry.sliding_window)
    return ((attention @ latent) @ up_value.transpose(1, 2)).transpose(0, 1).flatten(1)


def converted_output(geometry: AttentionGeometry, weights: MLAWeights, inputs: Tensor, rows: Tensor) -> Tensor:
    """What the converted attention block adds to the residual stream at the sampled rows, ``[n, D]``."""
    contexts = converted_contexts(geometry, weights, inputs, rows)
    return torch.nn.functional.linear(contexts, weights.o_proj, weights.o_proj_bias)
