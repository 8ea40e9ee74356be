"""What `attention_aware` measures on the calibration text: how much each key, value and rotation matters to the output.

All of it is summed over windows, so memory does not grow with the text. Notation of the docstrings: query row i, key
row j, ``A`` the attention weights, ``v`` values, ``ctx_i = sum_j A_ij v_j``, ``O_h`` the columns of ``o_proj`` that
read head h, ``D = i - j``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from ..devices.running_sums import RunningSums
from ..forward.attention import (
    Rotation,
    SourceHeads,
    attended,
    attention_of,
    cap_slope,
    source_heads,
    source_scores,
)
from ..layers import AttentionGeometry, AttentionWeights, encoder_input
from .base import LayerStatistics

ROWS_PER_WINDOW = 64
"""Query rows sampled in each window; sums over rows are scaled up to the window's length."""
UNIFORM_SHARE = 0.25
"""Share of the token weight that ignores attention, so that no token is forgotten."""


class AttentionStatistics(LayerStatistics):
    """Running sums, float64, for one layer.

    ``tensors()``, with ``x~ = [x, 1]`` of the encoder's input x (the constant carries biases and means), N tokens:

    - ``moment [D+1, D+1]``: ``sum_j t_j x~_j x~_j^T``, token weights t that add up to 1 in every window;
    - ``mean [D+1]``: ``sum_j x~_j``, so the last entry is N;
    - ``query_moment [H, d, d]``: ``sum_i w_i q_i q_i^T``, un-rotated queries, ``w_i = sum_j W_ij``;
    - ``rotation [H, 2, d_rot/2]``: real and imaginary part of ``sum_ij W_ij |q_if|^2 exp(-i theta_f D)``;
    - ``attention_squared [H]``: ``sum_ij A_ij^2``;
    - ``log_power [1]``: sum over tokens of ``log mean(h^2)``, h the residual stream.
    """

    def __init__(self, geometry: AttentionGeometry, weights: AttentionWeights, seed: int) -> None:
        self.geometry, self.weights, self.seed = geometry, weights, seed
        width, heads, d = weights.k.shape[1] + 1, geometry.num_heads, geometry.head_dim
        self.sums = RunningSums(
            weights.k.device,
            moment=(width, width),
            mean=(width,),
            query_moment=(heads, d, d),
            rotation=(heads, 2, geometry.rotary_dim // 2),
            attention_squared=(heads,),
            log_power=(1,),
        )

    @override
    def update(self, attention_input: Tensor, residual: Tensor) -> None:
        for inputs, stream in zip(attention_input.float(), residual.float(), strict=True):
            self.add_window(inputs)
            self.sums.add("log_power", stream.square().mean(-1).log().to(self.sums.dtype).sum())

    def add_window(self, inputs: Tensor) -> None:
        """Adds the attention input ``[S, D]`` of one window, in its own precision."""
        rows = sample_rows(inputs.shape[0], ROWS_PER_WINDOW, self.seed, self.windows).to(inputs.device)
        self.windows += 1
        scale = inputs.shape[0] / len(rows)
        heads = source_heads(self.geometry, self.weights, inputs, rows)
        scores = source_scores(self.geometry, heads, rows)
        attention = attention_of(self.geometry, scores, rows, heads.sinks)
        score_weights = output_sensitivity(self.geometry, self.weights.o, heads, attention)
        score_weights *= cap_slope(self.geometry, scores) ** 2

        encoded = encoder_input(inputs, self.weights.k)
        augmented = torch.cat((encoded, encoded.new_ones(len(encoded), 1)), dim=1)
        squared = attention.square()
        token_weights = importance(score_weights.sum((0, 1)), squared.sum((0, 1)))
        row_weights = score_weights.sum(-1)
        self.sums.add("moment", (augmented.T * token_weights) @ augmented)
        self.sums.add("mean", augmented.to(self.sums.dtype).sum(0))
        self.sums.add("query_moment", scale * ((heads.queries.mT * row_weights[:, None]) @ heads.queries))
        self.sums.add("rotation", scale * rotation_moments(self.geometry, heads.queries, score_weights, rows))
        self.sums.add("attention_squared", scale * squared.sum((1, 2)))


def sample_rows(length: int, count: int, seed: int, window: int) -> Tensor:
    """``[count]`` distinct query positions of a window, ascending; all of them where the window is not longer.

    They are drawn on the CPU, so that they are the same for every device.
    """
    if length <= count:
        return torch.arange(length, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + window)
    return torch.randperm(length, generator=generator, device="cpu")[:count].sort().values


def output_sensitivity(geometry: AttentionGeometry, output: Tensor, heads: SourceHeads, attention: Tensor) -> Tensor:
    """``W_ij = A_ij^2 |O_h (v_j - ctx_i)|^2``: squared change of the block's output per unit change of a score.

    The derivative of softmax attention (the Gauss-Newton weight of one score); `[H, n, S]`. Of a score as the softmax
    sees it: the slope of a softcap is a factor besides.
    """
    gram = output_gram(geometry, output).to(attention.dtype)
    grouped = attention.unflatten(0, (geometry.num_kv_heads, geometry.num_key_value_groups))
    values = heads.values[:, None]
    context = attended(geometry, attention, heads.values).unflatten(0, grouped.shape[:2])
    gram = gram.unflatten(0, (geometry.num_kv_heads, geometry.num_key_value_groups))
    measured = values @ gram
    value_norm = (measured * values).sum(-1)
    context_norm = ((context @ gram) * context).sum(-1)
    distance = context @ (-2 * measured.mT)
    distance += value_norm[:, :, None]
    distance += context_norm[..., None]
    return distance.clamp_min_(0).mul_(grouped).mul_(grouped).flatten(0, 1)


def output_gram(geometry: AttentionGeometry, output: Tensor) -> Tensor:
    """``G_h = O_h^T O_h``, ``[H, d, d]``: the length of a head's context as the residual stream sees it."""
    blocks = output.unflatten(1, (geometry.num_heads, geometry.head_dim)).permute(1, 0, 2)
    return blocks.mT @ blocks


def importance(score_weight: Tensor, squared_attention: Tensor) -> Tensor:
    """Token weights ``[S]`` adding up to 1: what a token's key and its value do to the output, mixed with uniform."""
    length = score_weight.shape[0]
    seen = score_weight / score_weight.sum().clamp_min(1e-30) + squared_attention / squared_attention.sum()
    return (1 - UNIFORM_SHARE) / 2 * seen + UNIFORM_SHARE / length


def rotation_moments(geometry: AttentionGeometry, queries: Tensor, score_weights: Tensor, rows: Tensor) -> Tensor:
    """``sum_ij W_ij |q_if|^2 exp(-i theta_f (i - j))``, ``[H, 2, pairs]``, without forming the differences.

    ``exp(i theta_f j)`` is summed over keys for each row, then turned by the row's own angle.
    """
    rotation = Rotation.of(geometry.inv_freq, score_weights.shape[-1])
    turn_cos, turn_sin = rotation.cos.to(score_weights.dtype), rotation.sin.to(score_weights.dtype)
    cos, sin = (score_weights @ torch.cat((turn_cos, turn_sin), dim=1)).chunk(2, dim=-1)
    row_cos, row_sin = turn_cos[rows], turn_sin[rows]
    energy = pair_energy(geometry, queries)
    real = (energy * (cos * row_cos + sin * row_sin)).sum(1)
    imaginary = (energy * (sin * row_cos - cos * row_sin)).sum(1)
    return torch.stack((real, imaginary), dim=1)


def pair_energy(geometry: AttentionGeometry, states: Tensor) -> Tensor:
    """``|q_f|^2`` of the rotary pairs, ``[..., d] -> [..., d_rot/2]``."""
    half = geometry.rotary_dim // 2
    return states[..., :half].square() + states[..., half : 2 * half].square()
