"""Attention of a source layer and of its converted form over calibration windows, which start at position 0.

The methods measure with these; the model itself has its own attention. Where the attention weights themselves are
measured, they are formed for sampled query rows; outputs are computed for whole windows by PyTorch's fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import AttentionGeometry, AttentionWeights, MLAWeights, encoder_input
from .coding import as_cached

_ROWS = 128
"""Of a window, whose scores are formed at a time."""


@dataclass(frozen=True)
class Rotation:
    """cos and sin, ``[S, pairs]`` each, times the attention factor (RoFormer, arXiv 2104.09864, section 3.2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, inv_freq: Tensor, length: int, attention_factor: float = 1.0) -> Rotation:
        """For positions ``0 .. length - 1``; angles are formed in float32, as models do."""
        positions = torch.arange(length, dtype=torch.float32, device=inv_freq.device)
        angles = positions[:, None] * inv_freq.float()
        return cls(angles.cos() * attention_factor, angles.sin() * attention_factor)

    def apply(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Rotates the first ``2 * pairs`` channels of ``states [..., S, d]``, pair ``f`` being ``(f, f + pairs)``."""
        cos, sin = (self.cos, self.sin) if rows is None else (self.cos[rows], self.sin[rows])
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
        pairs = cos.shape[-1]
        real, imaginary, passive = states.split((pairs, pairs, states.shape[-1] - 2 * pairs), dim=-1)
        return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin, passive), dim=-1)


def causal_softmax(scores: Tensor, rows: Tensor, sliding_window: int | None, sinks: Tensor | None = None) -> Tensor:
    """Attention weights ``[H, n, S]`` of query positions ``rows [n]`` from their scores against all S positions."""
    columns = torch.arange(scores.shape[-1], device=scores.device)
    hidden = columns > rows[:, None]
    if sliding_window is not None:
        hidden |= columns <= rows[:, None] - sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]


def capped(geometry: AttentionGeometry, scores: Tensor) -> Tensor:
    """Scores of any shape as the softmax sees them."""
    return scores if geometry.softcap is None else geometry.softcap * torch.tanh(scores / geometry.softcap)


def cap_slope(geometry: AttentionGeometry, scores: Tensor) -> Tensor | float:
    """The derivative of `capped`: what is left of a change of a score."""
    return 1.0 if geometry.softcap is None else 1 - torch.tanh(scores / geometry.softcap).square()


@dataclass(frozen=True)
class SourceHeads:
    """One window through the source's projections: queries and keys not yet rotated.

    ``queries [H, n, d]`` at the sampled rows, ``keys`` and ``values [n_kv, S, d]``, ``sinks [H]``.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    sinks: Tensor | None = None


def source_heads(geometry: AttentionGeometry, weights: AttentionWeights, inputs: Tensor, rows: Tensor) -> SourceHeads:
    """Projects the attention input ``inputs [S, D]`` of one window; ``rows [n]`` are the query positions."""

    def heads(weight: Tensor, bias: Tensor | None) -> Tensor:
        read = encoder_input(inputs, weight)
        if geometry.behind_norms:
            states = read[:, weight.argmax(dim=1)]
        else:
            states = torch.nn.functional.linear(read, weight, bias)
        return states.unflatten(-1, (-1, geometry.head_dim)).transpose(0, 1)

    return SourceHeads(
        queries=project_queries(geometry, inputs[rows], weights.q, weights.q_bias),
        keys=heads(weights.k, weights.k_bias),
        values=heads(weights.v, weights.v_bias),
        sinks=weights.sinks,
    )


def project_queries(geometry: AttentionGeometry, inputs: Tensor, query_map: Tensor, bias: Tensor | None) -> Tensor:
    """Queries ``[H, S, m]`` of a source or converted layer from its attention input ``[S, D]``.

    Args:
        geometry: of the source layer.
        inputs: the attention input of one window.
        query_map: ``[H*m, D]``, or behind norms ``[H*m, d]``, of every head's own query.
        bias: ``[H*m]``; there is none behind norms.
    """
    if not geometry.behind_norms:
        return (
            torch.nn.functional.linear(inputs, query_map, bias).unflatten(-1, (geometry.num_heads, -1)).transpose(0, 1)
        )
    own = inputs[:, : geometry.num_heads * geometry.head_dim].unflatten(-1, (geometry.num_heads, -1)).transpose(0, 1)
    return own @ query_map.unflatten(0, (geometry.num_heads, -1)).mT


def source_scores(geometry: AttentionGeometry, heads: SourceHeads, rows: Tensor) -> Tensor:
    """The source's scores ``[H, n, S]``, future keys included, before a softcap."""
    rotation = Rotation.of(geometry.inv_freq, heads.keys.shape[1], geometry.attention_factor)
    queries, keys = rotation.apply(heads.queries, rows), rotation.apply(heads.keys)
    grouped = (queries * geometry.softmax_scale).unflatten(0, (geometry.num_kv_heads, -1)).flatten(1, 2)
    return (grouped @ keys.mT).unflatten(1, (geometry.num_key_value_groups, -1)).flatten(0, 1)


def attention_of(geometry: AttentionGeometry, scores: Tensor, rows: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Attention weights ``[H, n, S]`` from scores before a softcap."""
    return causal_softmax(capped(geometry, scores), rows, geometry.sliding_window, sinks)


def attended(geometry: AttentionGeometry, attention: Tensor, values: Tensor) -> Tensor:
    """Contexts ``[H, n, d]``: what the heads gather from their group's ``values [n_kv, S, d]``."""
    grouped = attention.unflatten(0, (geometry.num_kv_heads, -1)).flatten(1, 2)
    return (grouped @ values).unflatten(1, (geometry.num_key_value_groups, -1)).flatten(0, 1)


def window_attention(
    geometry: AttentionGeometry, queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None
) -> Tensor:
    """Contexts ``[S, H*d_v]`` of a whole window: rotated ``queries`` and ``keys [H, S, d]``, ``values [H, S, d_v]``.

    Softcaps and sinks, of which the fused kernel knows nothing, are attended to a few rows at a time.
    """
    if geometry.softcap is None and sinks is None:
        return fused_attention(geometry, queries, keys, values)
    contexts = []
    for rows in torch.arange(queries.shape[1], device=queries.device).split(_ROWS):
        scores = queries[:, rows] @ keys.mT * geometry.softmax_scale
        contexts.append(attention_of(geometry, scores, rows, sinks) @ values)
    return torch.cat(contexts, dim=1).transpose(0, 1).flatten(1)


def fused_attention(geometry: AttentionGeometry, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `window_attention`, by a kernel.

    The fused kernel wants heads of one size, so the narrower ones are filled up with zeros, which change nothing.
    """
    length, width, value_width = queries.shape[1], queries.shape[-1], values.shape[-1]
    fill = torch.nn.functional.pad
    queries, keys = (fill(states, (0, max(0, value_width - width))) for states in (queries, keys))
    values = fill(values, (0, max(0, width - value_width)))
    window = geometry.sliding_window
    mask = None
    if window is not None and window < length:
        mask = queries.new_ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    contexts = torch.nn.functional.scaled_dot_product_attention(
        queries[None], keys[None], values[None], mask, is_causal=mask is None, scale=geometry.softmax_scale
    )
    return contexts[0, :, :, :value_width].transpose(0, 1).flatten(1)


def source_output(geometry: AttentionGeometry, weights: AttentionWeights, inputs: Tensor) -> Tensor:
    """What the source's attention block adds to the residual stream, ``[S, D]``, from its input ``inputs [S, D]``."""
    heads = source_heads(geometry, weights, inputs, torch.arange(inputs.shape[0], device=inputs.device))
    rotation = Rotation.of(geometry.inv_freq, inputs.shape[0], geometry.attention_factor)
    keys, values = (
        states.repeat_interleave(geometry.num_key_value_groups, dim=0)
        for states in (rotation.apply(heads.keys), heads.values)
    )
    contexts = window_attention(geometry, rotation.apply(heads.queries), keys, values, heads.sinks)
    return torch.nn.functional.linear(contexts, weights.o, weights.o_bias)


def converted_contexts(geometry: AttentionGeometry, weights: MLAWeights, inputs: Tensor) -> Tensor:
    """Per-head contexts of the converted layer, side by side: what its ``o_proj`` reads, ``[S, H*d_v]``."""
    nope, v_dim, pairs = weights.qk_nope_head_dim, weights.v_head_dim, weights.inv_freq.numel()
    heads, length = geometry.num_heads, inputs.shape[0]
    query = project_queries(geometry, inputs, weights.q_proj, weights.q_proj_bias)
    q_nope, q_rope = query.split((nope, 2 * pairs), dim=-1)
    read = encoder_input(inputs, weights.kv_a_proj_with_mqa)
    cached = torch.nn.functional.linear(read, weights.kv_a_proj_with_mqa, weights.kv_a_proj_with_mqa_bias)
    latent, key_rope = cached.split((cached.shape[-1] - 2 * pairs, 2 * pairs), dim=-1)
    rotation = Rotation.of(weights.inv_freq, length, geometry.attention_factor)
    key_rope = rotation.apply(key_rope)
    if weights.code is not None:
        latent, key_rope = as_cached(geometry, weights.code, latent, key_rope)
    expanded = torch.nn.functional.linear(latent, weights.kv_b_proj).unflatten(-1, (heads, nope + v_dim))
    k_nope, values = expanded.transpose(0, 1).split((nope, v_dim), dim=-1)
    shared = key_rope.expand(heads, -1, -1)
    queries = torch.cat((q_nope, rotation.apply(q_rope)), dim=-1)
    return window_attention(geometry, queries, torch.cat((k_nope, shared), dim=-1), values, weights.sinks)


def converted_output(geometry: AttentionGeometry, weights: MLAWeights, inputs: Tensor) -> Tensor:
    """What the converted attention block adds to the residual stream, ``[S, D]``, from its input ``inputs [S, D]``."""
    return torch.nn.functional.linear(
        converted_contexts(geometry, weights, inputs), weights.o_proj, weights.o_proj_bias
    )
