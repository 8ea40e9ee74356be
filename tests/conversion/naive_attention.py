"""Attention written as its definition, position by position and in complex numbers: the oracle of the method tests."""

from __future__ import annotations

import cmath

import torch
from torch import Tensor

from conversion.layers import AttentionGeometry, AttentionWeights, MLAWeights


def random_layer(
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 8,
    rotary_dim: int = 8,
    hidden: int = 20,
    biases: bool = False,
    sliding_window: int | None = None,
    attention_factor: float = 1.0,
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
    sinks: bool = False,
) -> tuple[AttentionGeometry, AttentionWeights]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def bias(size: int) -> Tensor | None:
        return draw(size) if biases else None

    inv_freq = 3.0 * 100.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float32) / max(rotary_dim // 2, 1))
    geometry = AttentionGeometry(
        hidden, heads, kv_heads, head_dim, inv_freq, head_dim**-0.5, attention_factor, sliding_window, softcap
    )
    weights = AttentionWeights(
        q=draw(heads * head_dim, hidden) / hidden**0.5,
        k=draw(kv_heads * head_dim, hidden) / hidden**0.5,
        v=draw(kv_heads * head_dim, hidden) / hidden**0.5,
        o=draw(hidden, heads * head_dim) / hidden**0.5,
        q_bias=bias(heads * head_dim),
        k_bias=bias(kv_heads * head_dim),
        v_bias=bias(kv_heads * head_dim),
        o_bias=bias(hidden),
        sinks=draw(heads) if sinks else None,
    )
    return geometry, weights


def source_output(geometry: AttentionGeometry, weights: AttentionWeights, inputs: Tensor) -> Tensor:
    """``[S, D] -> [S, D]`` of a source layer."""
    d, half, groups = geometry.head_dim, geometry.rotary_dim // 2, geometry.num_key_value_groups
    q = _linear(inputs, weights.q, weights.q_bias).view(len(inputs), -1, d)
    k = _linear(inputs, weights.k, weights.k_bias).view(len(inputs), -1, d)
    v = _linear(inputs, weights.v, weights.v_bias).view(len(inputs), -1, d)
    contexts = []
    for head in range(geometry.num_heads):
        group = head // groups
        scores = _scores(geometry, q[:, head, : 2 * half], k[:, group, : 2 * half], geometry.inv_freq)
        scores += q[:, head, 2 * half :] @ k[:, group, 2 * half :].T
        contexts.append(_attend(geometry, scores, weights.sinks, head) @ v[:, group])
    return _linear(torch.cat(contexts, dim=1), weights.o, weights.o_bias)


def converted_output(geometry: AttentionGeometry, weights: MLAWeights, inputs: Tensor) -> Tensor:
    """``[S, D] -> [S, D]`` of a converted layer."""
    nope, pairs = weights.qk_nope_head_dim, len(weights.inv_freq)
    q = _linear(inputs, weights.q_proj, weights.q_proj_bias).view(len(inputs), geometry.num_heads, -1)
    cached = _linear(inputs, weights.kv_a_proj_with_mqa, weights.kv_a_proj_with_mqa_bias)
    latent, rotary = cached[:, : cached.shape[1] - 2 * pairs], cached[:, cached.shape[1] - 2 * pairs :]
    up = weights.kv_b_proj.view(geometry.num_heads, nope + weights.v_head_dim, -1)
    contexts = []
    for head in range(geometry.num_heads):
        scores = _scores(geometry, q[:, head, nope:], rotary, weights.inv_freq)
        scores += q[:, head, :nope] @ (latent @ up[head, :nope].T).T
        contexts.append(_attend(geometry, scores, weights.sinks, head) @ (latent @ up[head, nope:].T))
    return _linear(torch.cat(contexts, dim=1), weights.o_proj, weights.o_proj_bias)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs @ weight.T if bias is None else inputs @ weight.T + bias


def _scores(geometry: AttentionGeometry, q: Tensor, k: Tensor, inv_freq: Tensor) -> Tensor:
    """``Re sum_f conj(q_f) k_f exp(-i theta_f (i - j))``, times the squared attention factor."""
    half = len(inv_freq)
    scores = torch.zeros(len(q), len(k), dtype=q.dtype)
    for f in range(half):
        pair_q, pair_k = torch.complex(q[:, f], q[:, f + half]), torch.complex(k[:, f], k[:, f + half])
        for i in range(len(q)):
            for j in range(len(k)):
                turned = pair_q[i].conj() * pair_k[j] * cmath.exp(-1j * float(inv_freq[f]) * (i - j))
                scores[i, j] += geometry.attention_factor**2 * turned.real
    return scores


def _attend(geometry: AttentionGeometry, scores: Tensor, sinks: Tensor | None, head: int) -> Tensor:
    attention = torch.zeros_like(scores)
    for i in range(len(scores)):
        first = 0 if geometry.sliding_window is None else max(0, i - geometry.sliding_window + 1)
        seen = scores[i, first : i + 1] * geometry.softmax_scale
        if geometry.softcap is not None:
            seen = geometry.softcap * torch.tanh(seen / geometry.softcap)
        sink = 0.0 if sinks is None else sinks[head].exp()
        attention[i, first : i + 1] = seen.exp() / (seen.exp().sum() + sink)
    return attention
