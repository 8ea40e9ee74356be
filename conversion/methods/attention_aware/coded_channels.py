"""The channels of a layer's cache in the units of `joint_latent`: how far they vary, and what an error costs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...layers import AttentionGeometry, LayerBudget, MLAWeights
from ..preparation import ChannelStatistics, prepare_latent, prepare_rotary_key, rounding_loss, rounding_power
from ..rotary_pca import RotaryKey


def latent_variances(rows: Tensor, moment: Tensor) -> Tensor:
    """``[n]``: how far the latents ``rows @ [x, 1]`` vary, about their mean where constants cost nothing.

    Args:
        rows: ``[n, D+1]``.
        moment: ``[D+1, D+1]`` of what the latent must hold; the first tokens, which are not coded, hardly tell in it.
    """
    return ((rows @ moment) * rows).sum(-1).clamp_min(0)


def latent_rounding(variances: Tensor, bits: int) -> Tensor:
    """What rounding a latent of each rank costs, ``[n+1]`` for ranks 0 to n, in the units of its spectrum.

    Args:
        variances: ``[n]``, of `latent_variances` for the directions of the spectrum.
        bits: of a channel.
    """
    ranks = range(1, len(variances) + 1)
    loss = torch.ones_like(variances)
    powers = [rounding_power(bits, rank) * rounding_loss(variances[:rank], loss[:rank]) for rank in ranks]
    return variances.new_tensor([0.0, *powers])


def rotary_loss(geometry: AttentionGeometry, query_moment: Tensor, rotary: RotaryKey) -> Tensor:
    """``[2m]``: what a unit of squared error in a channel of the shared rotary key does to scores.

    It is the energy with which all queries meet a component, half of it for each channel: the error turns with the key.

    Args:
        geometry: of the layer.
        query_moment: ``[H, d, d]``, weighted, of the source's queries before their rotation.
        rotary: of ``m`` components.
    """
    pairs = geometry.rotary_dim // 2
    real, imaginary = slice(0, pairs), slice(pairs, 2 * pairs)
    hermitian = torch.complex(
        query_moment[:, real, real] + query_moment[:, imaginary, imaginary],
        query_moment[:, imaginary, real] - query_moment[:, real, imaginary],
    )
    decoder = rotary.decoder.repeat_interleave(geometry.num_key_value_groups, dim=0)
    energy = (decoder.conj() * (hermitian @ decoder)).real.sum((0, 1)).clamp_min(0)
    return geometry.attention_factor**2 * energy.repeat(2) / 2


def prepared(
    geometry: AttentionGeometry,
    weights: MLAWeights,
    budget: LayerBudget,
    moment: Tensor,
    loss: Tensor,
    *,
    centre: bool,
) -> MLAWeights:
    """The converted layer in the coordinates of `preparation`, with the code of its budget.

    Args:
        geometry: of the layer.
        budget: that it was made for, with its bits.
        weights: the layer, whose latent has all its channels in the units of the loss.
        moment: ``[D+1, D+1]``, weighted, of ``[x, 1]``; the first tokens, which are not coded, hardly tell in it.
        loss: of `rotary_loss`.
        centre: the latent's mean may be taken away, for constants cancel.
    """
    rows, bias = weights.kv_a_proj_with_mqa.double(), weights.kv_a_proj_with_mqa_bias
    constant = rows.new_zeros(len(rows)) if bias is None else bias.double()
    rows = torch.cat((rows, constant[:, None]), dim=1)
    total = moment[-1, -1]
    mean = rows @ moment[-1] / total
    second = ((rows @ moment) * rows).sum(-1) / total
    rank = budget.kv_lora_rank
    latent = ChannelStatistics(mean[:rank], second[:rank], torch.ones_like(mean[:rank]))
    rotary = ChannelStatistics(mean[rank:], geometry.attention_factor**2 * second[rank:], loss)
    code = budget.code
    assert code is not None
    if not code.latent.is_exact:
        weights = prepare_latent(weights, latent, centre=centre)
    if not code.rope.is_exact:
        weights = prepare_rotary_key(weights, rotary)
    return replace(weights, code=code)
