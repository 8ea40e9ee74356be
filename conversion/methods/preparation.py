"""What makes a latent and its rotary key fit for few bits, folded into the weights: exact in real numbers.

A token's latent is coded with one step for all its channels, behind an orthogonal matrix that spreads the rounding
evenly over them. Three changes of coordinates go before, none of which attention sees:

- Each channel's mean is taken away. In un-rotated keys it is a constant, which softmax ignores; in values it is an
  output bias, for attention weights add up to one.
- Channels are scaled. With scales ``s_i``, variances ``v_i`` and a loss of ``w_i`` a unit of squared error, rounding
  costs in proportion to ``(sum_i s_i^2 v_i) (sum_i w_i / s_i^2)``, which is least at ``s_i^4 = w_i / v_i``.
- The orthogonal matrix itself. That of the rotary key has to come behind the rotation, and is the cache's own; the
  scale of a rotary pair commutes with the rotation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from modeling_mla.hartley_mla import hartley_matrix
from modeling_mla.latent_code_mla import EXACT, PartCode

from ..layers import MLAWeights

_FLOOR = 1e-3
"""Of the mean variance and the mean loss, added to all: what little text did not show is not taken to be nothing."""


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of the channels of one part of a layer's cache, as the converted layer writes it; float64.

    ``mean [n]`` and ``second_moment [n]`` are of the channels over the text; ``loss [n]`` is what
    a unit of squared error costs, in units of its own. Channels of a rotary key are real parts, then imaginary parts.
    """

    mean: Tensor
    second_moment: Tensor
    loss: Tensor

    def variance(self, *, centred: bool) -> Tensor:
        """``[n]``, about the mean or about zero."""
        return (self.second_moment - self.mean.square() if centred else self.second_moment).clamp_min(0)


def rounding_loss(variance: Tensor, loss: Tensor) -> float:
    """What rounding costs behind the best scales, for rounding errors whose mean square is that of what is coded.

    ``(sum_i sqrt(w_i v_i))^2 / n`` for a variance ``v [n]`` and a loss ``w [n]``, the minimum of the problem above.
    """
    return float((variance * loss).sqrt().sum().square() / max(len(variance), 1))


def rounding_power(bits: int, channels: int) -> float:
    """The mean square of rounding errors, relative to that of the normal variables that one step codes.

    The step divides the largest of ``channels`` of them, by its median, into levels of so many bits, or a share of it
    that errs less: within the levels by a twelfth of the step's square, beyond them by what is cut off, of the largest
    and of the others that are below it.
    """
    if bits == EXACT:
        return 0.0
    normal = NormalDist()
    largest = normal.inv_cdf((1 + 2 ** (-1 / channels)) / 2)

    def beyond(start: float, limit: float) -> float:
        """The mean of ``(x - limit)^2`` over all ``x`` from ``start`` on."""
        return (1 + limit**2) * (1 - normal.cdf(start)) + (start - 2 * limit) * normal.pdf(start)

    def power(limit: float) -> float:
        cut_off = 2 * (beyond(limit, limit) - beyond(largest, limit)) + (largest - limit) ** 2 / channels
        return (limit / (2**bits - 1)) ** 2 / 3 + cut_off

    return min(power(share * largest) for share in PartCode(((channels, bits),)).scale_shares)


def best_scales(variance: Tensor, loss: Tensor) -> Tensor:
    """``s [n] = (w / v)^(1/4)``; all 1 where nothing varies, or no error costs anything."""
    if not (variance.any() and loss.any()):
        return torch.ones_like(variance)
    return ((loss + _FLOOR * loss.mean()) / (variance + _FLOOR * variance.mean())) ** 0.25


def prepare_latent(weights: MLAWeights, latent: ChannelStatistics, *, centre: bool) -> MLAWeights:
    """The same layer with its latent in the coordinates of the module.

    Args:
        weights: of the converted layer.
        latent: ``n = kv_lora_rank``.
        centre: whether means are taken away; beneath a softcap, or beside a sink, they are no constants.
    """
    down, up = weights.kv_a_proj_with_mqa.double(), weights.kv_b_proj.double()
    rank = up.shape[1]
    scales = best_scales(latent.variance(centred=centre), latent.loss)
    spread = hartley_matrix(rank, torch.float64, down.device).T
    encode, decode = spread * scales, (spread / scales).T
    dtype = weights.q_proj.dtype
    constant = weights.kv_a_proj_with_mqa_bias
    if centre and constant is None:
        constant = down.new_zeros(len(down))
    mean = latent.mean if centre else torch.zeros_like(latent.mean)
    if constant is not None:
        constant = torch.cat((encode @ (constant[:rank].double() - mean), constant[rank:].double()))
    values = up.unflatten(0, (-1, weights.qk_nope_head_dim + weights.v_head_dim))[:, weights.qk_nope_head_dim :]
    output = weights.o_proj_bias
    if centre:
        moved = weights.o_proj.double() @ (values @ mean).flatten()
        output = moved if output is None else output.double() + moved
    return replace(
        weights,
        kv_a_proj_with_mqa=torch.cat((encode @ down[:rank], down[rank:])).to(dtype),
        kv_b_proj=(up @ decode).to(dtype),
        kv_a_proj_with_mqa_bias=None if constant is None else constant.to(dtype),
        o_proj_bias=None if output is None else output.to(dtype),
    )


def prepare_rotary_key(weights: MLAWeights, rotary: ChannelStatistics) -> MLAWeights:
    """The same layer with the pairs of its rotary key scaled, and inversely those of every query.

    Args:
        weights: of the converted layer.
        rotary: ``n = qk_rope_head_dim``; both channels of a pair get one scale.
    """
    pairs, rank = weights.inv_freq.numel(), weights.kv_b_proj.shape[1]
    variance, loss = (
        channels.unflatten(0, (2, pairs)).mean(0) for channels in (rotary.variance(centred=False), rotary.loss)
    )
    scales = best_scales(variance, loss).repeat(2)
    keys = torch.cat((scales.new_ones(rank), scales))
    queries = torch.cat((scales.new_ones(weights.qk_nope_head_dim), 1 / scales))
    queries = queries.repeat(len(weights.q_proj) // len(queries))

    def scaled(rows: Tensor, by: Tensor) -> Tensor:
        return (rows.double() * by.view(-1, *[1] * (rows.dim() - 1))).to(rows.dtype)

    query_bias, key_bias = weights.q_proj_bias, weights.kv_a_proj_with_mqa_bias

    return replace(
        weights,
        q_proj=scaled(weights.q_proj, queries),
        q_proj_bias=None if query_bias is None else scaled(query_bias, queries),
        kv_a_proj_with_mqa=scaled(weights.kv_a_proj_with_mqa, keys),
        kv_a_proj_with_mqa_bias=None if key_bias is None else scaled(key_bias, keys),
    )
