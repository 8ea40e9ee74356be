"""TransMLA (arXiv 2502.07864): a shared rotary key by real rotations, and balanced principal components.

1. All kv heads' keys become one head (section 4.1). Rotary pairs are taken in groups of ``fold`` neighbouring
   frequencies; one real rotation, the same for real and imaginary parts, concentrates a group's energy in its leading
   components (RoRoPE and FreqFold, section 4.2). The leading ones stay rotated, the rest loses its position.
2. Keys without rotation, divided by the ratio of their norm to the values', and values share one latent: the leading
   eigenvectors of their uncentred second moment (BKV-PCA, section 4.3).

The first step reads activations of the source. The second reads those of the model that the first has changed in every
layer, as the authors' code does: a second pass over the text.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from ..devices.decompositions import eigh
from ..devices.running_sums import RunningSums
from ..errors import BudgetError
from ..forward.heads import augmented_rows
from ..layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights, encoder_input
from .base import LayerStatistics, TwoPassMethod
from .rotary_pca import RotaryKey, as_pairs, from_pairs, rotary_queries

FOLD_PER_COLLAPSE = 2
"""Neighbouring frequencies in a group, for each one that keeps a rotated component.

The authors search it for every model; with heads of 64 this is what their search finds for 64 and for 32 rotated
channels.
"""


class SecondMoment(LayerStatistics):
    """``moment [D+1, D+1] = sum_j x~_j x~_j^T``, float64, ``x~ = [x, 1]`` of the encoder's input x."""

    def __init__(self, weights: AttentionWeights) -> None:
        self.weights = weights
        width = weights.k.shape[1] + 1
        self.sums = RunningSums(weights.k.device, moment=(width, width))

    @override
    def update(self, attention_input: Tensor, residual: Tensor) -> None:
        """Adds the second moments of the windows; the residual stream is not read."""
        for window in attention_input:
            inputs = encoder_input(window, self.weights.k).float()
            augmented = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1)
            self.sums.add("moment", augmented.T @ augmented)


class TransMLAMethod(TwoPassMethod):
    """A concentrated rotary key and a balanced latent, as the module says; it reads the text twice."""

    name = "transmla"
    source = "TransMLA (arXiv 2502.07864), sections 4.1 to 4.3"
    needs_calibration = True

    @override
    def smallest(self, geometry: AttentionGeometry) -> LayerBudget:
        return LayerBudget(kv_lora_rank=1, qk_rope_head_dim=_half(geometry.rotary_dim))

    @override
    def largest(self, geometry: AttentionGeometry) -> LayerBudget:
        """One head's rotary channels, and everything else at full rank: the model that only lost rotations."""
        return _full_rank(geometry, geometry.rotary_dim)

    @override
    def split(self, geometry: AttentionGeometry, cache_elements: int) -> LayerBudget:
        """A whole head of rotary channels where the latent can be as wide, else half of one."""
        rotary = geometry.rotary_dim if cache_elements >= 2 * geometry.rotary_dim else _half(geometry.rotary_dim)
        if not rotary < cache_elements <= geometry.cache_elements:
            raise BudgetError(
                f"method {self.name} cannot cache {cache_elements} values a token and layer; the limits of this layer "
                f"are {rotary + 1} to {geometry.cache_elements}."
            )
        return LayerBudget(kv_lora_rank=cache_elements - rotary, qk_rope_head_dim=rotary)

    @override
    def check(self, geometry: AttentionGeometry, budget: LayerBudget) -> None:
        if budget.qk_rope_head_dim and geometry.rotary_dim % budget.qk_rope_head_dim:
            raise BudgetError(
                f"qk_rope_head_dim {budget.qk_rope_head_dim} does not divide the {geometry.rotary_dim} rotary channels "
                f"of a head, as method {self.name} needs; leave it out, or choose {geometry.rotary_dim} or "
                f"{_half(geometry.rotary_dim)}."
            )

    @override
    def statistics(self, geometry: AttentionGeometry, weights: AttentionWeights, seed: int) -> SecondMoment:
        return SecondMoment(weights)

    @override
    def factorise(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor] | None,
        budget: LayerBudget,
        second: dict[str, Tensor] | None = None,
    ) -> MLAWeights:
        assert statistics is not None, "TransMLA needs second moments"
        assert second is not None, "TransMLA needs those of a second pass"
        return _factorise(geometry, weights, statistics["moment"], second["moment"], budget)

    @override
    def intermediate(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor],
        qk_rope_head_dim: int,
    ) -> MLAWeights:
        """The layer that only lost rotations: its latent, of full rank, is exact whatever the moment."""
        moment = statistics["moment"]
        return _factorise(geometry, weights, moment, moment, _full_rank(geometry, qk_rope_head_dim))


def _factorise(
    geometry: AttentionGeometry,
    weights: AttentionWeights,
    source_moment: Tensor,
    latent_moment: Tensor,
    budget: LayerBudget,
) -> MLAWeights:
    """Both steps, each with the moment ``[D+1, D+1]`` of the activations that it reads."""
    pairs, groups, d = geometry.rotary_dim // 2, geometry.num_key_value_groups, geometry.head_dim
    query, key, value = (
        augmented_rows(weight, bias, d)
        for weight, bias in (
            (weights.q, weights.q_bias),
            (weights.k, weights.k_bias),
            (weights.v, weights.v_bias),
        )
    )
    components = budget.qk_rope_head_dim // 2
    rotary, lost = concentrated_key(as_pairs(key, pairs), source_moment.double(), geometry.inv_freq, components)
    lost_rows = geometry.attention_factor**2 * from_pairs(lost.encoder)
    unrotated = torch.cat((lost_rows, key[:, 2 * pairs :].flatten(0, 1)))
    down, up_unrotated, up_value = balanced_latent(
        unrotated, value.flatten(0, 1), latent_moment.double(), budget.kv_lora_rank
    )
    up_pairs = as_pairs(up_unrotated[: len(lost_rows)], len(lost.encoder))
    up_passive = up_unrotated[len(lost_rows) :].unflatten(0, (geometry.num_kv_heads, -1))
    up_key = torch.cat((from_pairs(lost.decoder @ up_pairs), up_passive), dim=1)

    query = torch.cat((query, rotary_queries(groups, as_pairs(query, pairs), rotary)), dim=1).flatten(0, 1)
    up = torch.cat((up_key, up_value.unflatten(0, (-1, d))), dim=1).repeat_interleave(groups, dim=0).flatten(0, 1)
    cached = torch.cat((down, from_pairs(rotary.encoder)))
    has_bias = weights.k_bias is not None or weights.v_bias is not None
    dtype = weights.q.dtype
    return MLAWeights(
        q_proj=query[:, :-1].to(dtype),
        kv_a_proj_with_mqa=cached[:, :-1].to(dtype),
        kv_b_proj=up.to(dtype),
        o_proj=weights.o,
        inv_freq=rotary.inv_freq,
        qk_nope_head_dim=d,
        v_head_dim=d,
        q_proj_bias=None if weights.q_bias is None else query[:, -1].to(dtype),
        kv_a_proj_with_mqa_bias=cached[:, -1].to(dtype) if has_bias else None,
        o_proj_bias=weights.o_bias,
        sinks=weights.sinks,
    )


def concentrated_key(keys: Tensor, moment: Tensor, inv_freq: Tensor, components: int) -> tuple[RotaryKey, RotaryKey]:
    """RoRoPE with FreqFold: real principal components over the kv heads in every group of neighbouring frequencies.

    Real and imaginary parts count as separate samples of one second moment, whose eigenvectors turn both alike. Every
    ``pairs / components``-th frequency is kept, and each of a group's kept ones turns one of its leading components.

    Args:
        keys: ``[n_kv, pairs, D+1]``, complex key rows.
        moment: ``[D+1, D+1]``, of ``[x, 1]``.
        inv_freq: ``[pairs]``.
        components: how many to keep, a divisor of ``pairs``, or none.

    Returns:
        The leading components, which stay rotated, and the others, whose frequencies are zero. Together their
        decoders are one orthogonal matrix.
    """
    kv, pairs, _ = keys.shape
    collapse = pairs // components if components else 1
    fold = min(FOLD_PER_COLLAPSE * collapse, pairs)
    encoders, decoders, kept = [keys[0, :0]], [keys[:, :, :0]], [torch.zeros(0, dtype=torch.bool, device=keys.device)]
    for first in range(0, pairs, max(fold, 1)):
        members = min(fold, pairs - first)
        rows = keys[:, first : first + members].flatten(0, 1)
        # The real part of K Sigma K^H is the sum over real and imaginary rows.
        energy = (rows @ moment.to(rows.dtype) @ rows.mH).real
        rotation = eigh(energy)[1].flip(-1).to(keys.dtype)
        decoder = keys.new_zeros(kv, pairs, len(rows))
        decoder[:, first : first + members] = rotation.view(kv, members, -1)
        encoders.append(rotation.T @ rows)
        decoders.append(decoder)
        kept.append(torch.arange(len(rows), device=rows.device) < (members // collapse if components else 0))
    encoder, decoder, leading = torch.cat(encoders), torch.cat(decoders, dim=2), torch.cat(kept)
    frequencies = inv_freq[::collapse] if components else inv_freq[:0]
    unturned = inv_freq.new_zeros(int((~leading).sum()))
    return (
        RotaryKey(encoder[leading], decoder[..., leading], frequencies),
        RotaryKey(encoder[~leading], decoder[..., ~leading], unturned),
    )


def balanced_latent(keys: Tensor, values: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """BKV-PCA: principal components of ``[k / ratio, v]``, ratio of the mean norms of their channels, uncentred.

    Args:
        keys: ``[m, D+1]``, channels without rotation.
        values: ``[n, D+1]``.
        moment: ``[D+1, D+1]``, of ``[x, 1]``.
        rank: of the latent.

    Returns:
        ``down [rank, D+1]``, ``up_key [m, rank]`` and ``up_value [n, rank]``.
    """

    def mean_norm(rows: Tensor) -> Tensor:
        return ((rows @ moment) * rows).sum(-1).clamp_min(0).sqrt().mean()

    key_norm, value_norm = mean_norm(keys), mean_norm(values)
    # Dead keys or values, or no keys, have nothing to be balanced.
    ratio = key_norm / value_norm if key_norm > 0 and value_norm > 0 else moment.new_ones(())
    targets = torch.cat((keys / ratio, values))
    second_moment = targets @ moment @ targets.mT
    leading = eigh((second_moment + second_moment.mT) / 2)[1].flip(-1)[:, :rank]
    up_key, up_value = leading.split((len(keys), len(values)))
    return leading.mT @ targets, ratio * up_key, up_value


def _full_rank(geometry: AttentionGeometry, qk_rope_head_dim: int) -> LayerBudget:
    """A rotary key of this width, and all channels that it leaves."""
    return LayerBudget(geometry.cache_elements - qk_rope_head_dim, qk_rope_head_dim)


def _half(rotary_dim: int) -> int:
    """Half of the rotary channels, where that is a whole number of pairs."""
    return rotary_dim // 2 if rotary_dim % 4 == 0 else rotary_dim
