"""Attention-aware conversion: the closed-form recipe that measures every loss by what attention outputs.

1. Statistics of the source on text (`statistics`): which tokens, scores and query directions move the output.
2. A shared rotary key (`rotary_pca`): complex components over the kv heads, chosen by what a constant cannot explain.
3. What lost its rotation keeps its mean rotation, for every query head and pair a complex constant.
4. One latent (`joint_latent`) for those keys and the values together.
5. Ranks by layer (`allocation`), by what the loss of each layer alone does to the model's predictions.
6. Where the cache is coded, the latent and the rotary key made fit for few bits (`coded_channels`).
7. The output projection refitted (`value_ridge`), one layer after the other, in the model converted so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from ...devices.choice import CPU
from ...errors import BudgetError
from ...forward.heads import augmented_rows, constants_cancel, repeat_groups
from ...layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights
from ..attention_statistics import AttentionStatistics, output_gram, pair_energy
from ..base import LayerRefit, Method
from ..rotary_pca import (
    RotaryKey,
    as_pairs,
    from_pairs,
    mean_rotation,
    mean_rotation_matrix,
    rotary_queries,
    shared_rotary_key,
    table_rotary_key,
    unexplained_energy,
)
from .allocation import allocate_ranks, near_median
from .coded_channels import latent_rounding, latent_variances, prepared, rotary_loss
from .joint_latent import JointLatent, centred, joint_latent, latent_spectrum, latent_targets
from .value_ridge import ValueRidge

KEY_GAIN = 2.5
"""Keys against values in the joint latent. Above 1 because an error in a score meets all later tokens."""
FOLD_BELOW = 0.5
"""Of the source's cache: below it two neighbouring frequencies may share a rotary component."""
SMALLEST_RANK = 16
RATE_SPREAD = (0.5, 3.0)
"""Limits of a layer's sensitivity to what its latent loses, relative to the median layer: measured on little text."""


@dataclass(frozen=True)
class _Measured:
    """One layer's weights, with the bias as a last column (``x~ = [x, 1]``), beside its statistics; all float64."""

    query: Tensor
    """``[H, d, D+1]``"""
    key: Tensor
    """``[n_kv, d, D+1]``"""
    value: Tensor
    """``[n_kv, d, D+1]``"""
    moment: Tensor
    """``[D+1, D+1]``"""
    coded_moment: Tensor
    """``[D+1, D+1]``: of what the latent must hold, constants left out where they cost nothing"""
    mean: Tensor
    """``[D+1]``, of ``x~``"""
    mean_rotation: Tensor
    """``R_h [H, d, d]``: what stands for the rotation of a head's keys where they lose it"""
    rotary_weight: Tensor
    """``[n_kv, pairs]``: energy that the mean rotation leaves unexplained"""
    query_moment: Tensor
    """``Q_h [H, d, d]``: weighted second moments of the queries"""
    key_metric: Tensor
    """``M_K [n_kv, d, d] = sum_h R_h^T Q_h R_h``: second moments of the queries as they meet un-rotated keys"""
    value_metric: Tensor
    """``M_V [n_kv, d, d]``: through ``o_proj``"""

    @classmethod
    def of(
        cls,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor],
        *,
        constants: bool = True,
    ) -> _Measured:
        """``constants``: the layer may have biases, so that means cost nothing where constants cancel."""
        d, kv = geometry.head_dim, geometry.num_kv_heads

        def over_group(per_head: Tensor) -> Tensor:
            return per_head.unflatten(0, (kv, geometry.num_key_value_groups)).sum(1)

        tokens, moment = float(statistics["mean"][-1]), statistics["moment"].double()
        query_moment = statistics["query_moment"].double() / (tokens * d)
        energy = pair_energy_of_moment(geometry, query_moment)
        rho = mean_rotation(statistics["rotation"].double() / (tokens * d), energy)
        rotation = mean_rotation_matrix(rho, d)
        free = constants and constants_cancel(geometry, weights)
        gram = statistics["attention_squared"].double()[:, None, None] * output_gram(geometry, weights.o.double())
        return cls(
            query=augmented_rows(weights.q, weights.q_bias, d),
            key=augmented_rows(weights.k, weights.k_bias, d),
            value=augmented_rows(weights.v, weights.v_bias, d),
            moment=moment,
            coded_moment=centred(moment) if free else moment,
            mean=statistics["mean"].double() / tokens,
            mean_rotation=rotation,
            rotary_weight=over_group(unexplained_energy(energy, rho)),
            query_moment=query_moment,
            key_metric=over_group(rotation.mT @ query_moment @ rotation),
            value_metric=over_group(gram) / tokens,
        )


def pair_energy_of_moment(geometry: AttentionGeometry, moment: Tensor) -> Tensor:
    """``sum w |q_f|^2`` of the rotary pairs from ``sum w q q^T``: ``[..., d, d] -> [..., pairs]``."""
    return pair_energy(geometry, moment.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt())


def _residual_power(statistics: dict[str, Tensor]) -> Tensor:
    """Over all tokens, by the geometric mean of theirs: the unit in which the losses of layers compare."""
    tokens = statistics["mean"][-1]
    return tokens * (statistics["log_power"] / tokens).exp()


class AttentionAwareMethod(Method):
    """The closed-form recipe of this module, which reads text and trains nothing."""

    name = "attention_aware"
    source = "this project"
    needs_calibration = True
    codes = True
    allocates = True

    @override
    def smallest(self, geometry: AttentionGeometry) -> LayerBudget:
        return LayerBudget(kv_lora_rank=SMALLEST_RANK, qk_rope_head_dim=2 if geometry.rotary_dim else 0)

    @override
    def largest(self, geometry: AttentionGeometry) -> LayerBudget:
        """Beyond it nothing is lost that more rank could keep: every pair rotated, keys and values at full rank."""
        rotary = geometry.num_kv_heads * geometry.rotary_dim
        return LayerBudget(kv_lora_rank=geometry.cache_elements - rotary, qk_rope_head_dim=rotary)

    @override
    def split(self, geometry: AttentionGeometry, cache_elements: int) -> LayerBudget:
        """Half of the rotary channels' share of the source's cache; all of it at the full size, two thirds at 1/8.

        The shares at 1/2, 1/4 and 1/8 are the best of those tried on held-out text.
        """
        smallest, largest = self.smallest(geometry), self.largest(geometry)
        if not smallest.cache_elements <= cache_elements <= largest.cache_elements:
            raise BudgetError(
                f"method {self.name} cannot cache {cache_elements} values a token and layer; the limits of this layer "
                f"are {smallest.cache_elements} to {largest.cache_elements}."
            )
        kept = cache_elements / geometry.cache_elements
        growth = max(0.0, 2 * kept - 1) ** 3 + max(0.0, 2 - 8 * kept) / 3
        share = largest.qk_rope_head_dim / geometry.cache_elements * (1 + growth) / 2
        rotary = max(2 * round(cache_elements * share / 2), smallest.qk_rope_head_dim)
        rotary = min(rotary, (cache_elements - smallest.kv_lora_rank) // 2 * 2)
        return LayerBudget(kv_lora_rank=cache_elements - rotary, qk_rope_head_dim=rotary)

    @override
    def statistics(self, geometry: AttentionGeometry, weights: AttentionWeights, seed: int) -> AttentionStatistics:
        return AttentionStatistics(geometry, weights, seed)

    @override
    def allocate(
        self,
        geometries: Sequence[AttentionGeometry],
        budgets: Sequence[LayerBudget],
        statistics: Sequence[dict[str, Tensor]],
        weights: Sequence[AttentionWeights],
        sensitivity: Sequence[float],
    ) -> list[LayerBudget]:
        """Moves ranks to where the next one saves most, if what the predictions lose goes with what the latent does.

        What it loses is the tail of the layer's spectrum, and what rounding costs; its unit is fixed by the sensitivity
        at the planned rank. Ranks move in steps of whole bytes, so that the sum of bytes stays.
        """
        saved, rates = [], []
        layers = zip(geometries, budgets, statistics, weights, sensitivity, strict=True)
        for geometry, budget, sums, layer, change in layers:
            measured = _Measured.of(geometry, layer, sums)
            targets, _ = self._targets(measured, self._rotary_key(geometry, measured, budget), geometry)
            spectrum, vectors = latent_spectrum(targets, measured.coded_moment)
            variances = latent_variances(vectors.mT @ targets, measured.coded_moment)
            # What is left is short, and looked at rank by rank.
            spectrum, variances, unit = spectrum.to(CPU), variances.to(CPU), _residual_power(sums).to(CPU)
            spectrum, rounded = spectrum / unit, latent_rounding(variances, budget.latent_bits) / unit
            saved.append(spectrum - rounded.diff())
            lost = spectrum[budget.kv_lora_rank :].sum() + rounded[budget.kv_lora_rank]
            rates.append(max(change, 0.0) / float(lost.clamp_min(1e-30)))
        largest = max(geometry.cache_elements - geometry.head_dim for geometry in geometries)
        smallest = min(SMALLEST_RANK, min(budget.kv_lora_rank for budget in budgets))
        gains = [rate * by_rank for rate, by_rank in zip(near_median(rates, RATE_SPREAD), saved, strict=True)]
        total, step = sum(budget.kv_lora_rank for budget in budgets), max(budget.rank_step for budget in budgets)
        ranks = allocate_ranks(gains, total, smallest, largest, step)
        return [replace(budget, kv_lora_rank=rank) for rank, budget in zip(ranks, budgets, strict=True)]

    @override
    def factorise(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor] | None,
        budget: LayerBudget,
    ) -> MLAWeights:
        assert statistics is not None, "the attention-aware method needs statistics"
        measured = _Measured.of(geometry, weights, statistics, constants=not budget.deepseek)
        rotary = self._rotary_key(geometry, measured, budget)
        targets, plain_units = self._targets(measured, rotary, geometry)
        latent = joint_latent(targets, plain_units, measured.coded_moment, budget.kv_lora_rank)
        converted = _assemble(geometry, weights, measured, rotary, latent)
        if budget.deepseek:
            return replace(converted, o_proj_bias=None)
        if budget.code is None:
            return converted
        loss = KEY_GAIN**2 * rotary_loss(geometry, measured.query_moment, rotary)
        return prepared(geometry, converted, budget, measured.moment, loss, centre=constants_cancel(geometry, weights))

    @override
    def refit(self, geometry: AttentionGeometry, weights: AttentionWeights, converted: MLAWeights) -> LayerRefit:
        return ValueRidge(geometry, weights, converted)

    def _rotary_key(self, geometry: AttentionGeometry, measured: _Measured, budget: LayerBudget) -> RotaryKey:
        keys = as_pairs(measured.key, geometry.rotary_dim // 2)
        of_keys = (keys, measured.moment, measured.rotary_weight, geometry.inv_freq)
        components = budget.qk_rope_head_dim // 2
        if budget.deepseek:
            return table_rotary_key(*of_keys, components)
        fold = 2 if budget.cache_elements < FOLD_BELOW * geometry.cache_elements else 1
        return shared_rotary_key(*of_keys, components, fold)

    def _targets(self, measured: _Measured, rotary: RotaryKey, geometry: AttentionGeometry) -> tuple[Tensor, Tensor]:
        pairs = geometry.rotary_dim // 2
        remainder = as_pairs(measured.key, pairs) - rotary.decoder @ rotary.encoder
        unrotated = from_pairs(geometry.attention_factor**2 * remainder)
        keys = torch.cat((unrotated, measured.key[:, geometry.rotary_dim :]), dim=1)
        return latent_targets(keys, measured.value, measured.key_metric, measured.value_metric, KEY_GAIN)


def _assemble(
    geometry: AttentionGeometry, weights: AttentionWeights, measured: _Measured, rotary: RotaryKey, latent: JointLatent
) -> MLAWeights:
    """Puts the parts in DeepSeek's layout.

    Constants of keys drop out and those of values become the output bias, or the latent holds them.
    """
    pairs, groups = geometry.rotary_dim // 2, geometry.num_key_value_groups
    query = torch.cat((measured.query, rotary_queries(groups, as_pairs(measured.query, pairs), rotary)), dim=1)
    query = query.flatten(0, 1)
    rotary_rows = from_pairs(rotary.encoder)
    up_key, up_value = (up.repeat_interleave(groups, dim=0) for up in (latent.up_key, latent.up_value))
    up = torch.cat((measured.mean_rotation @ up_key, up_value), dim=1).flatten(0, 1)
    down, latent_bias = latent.down[:, :-1], latent.down[:, -1]
    has_cached_bias = weights.k_bias is not None
    if constants_cancel(geometry, weights):
        latent_bias = torch.zeros_like(latent_bias)
    else:
        has_cached_bias |= weights.v_bias is not None
    lost = measured.value @ measured.mean - latent.up_value @ (down @ measured.mean[:-1] + latent_bias)
    output_bias = weights.o.double() @ repeat_groups(geometry, lost.flatten())
    if weights.o_bias is not None:
        output_bias = output_bias + weights.o_bias.double()
    key_bias = torch.cat((latent_bias, rotary_rows[:, -1])) if has_cached_bias else None
    dtype = weights.q.dtype
    return MLAWeights(
        q_proj=query[:, :-1].to(dtype),
        kv_a_proj_with_mqa=torch.cat((down, rotary_rows[:, :-1])).to(dtype),
        kv_b_proj=up.to(dtype),
        o_proj=weights.o,
        inv_freq=rotary.inv_freq,
        qk_nope_head_dim=geometry.head_dim,
        v_head_dim=geometry.head_dim,
        q_proj_bias=None if weights.q_bias is None else query[:, -1].to(dtype),
        kv_a_proj_with_mqa_bias=None if key_bias is None else key_bias.to(dtype),
        o_proj_bias=output_bias.to(dtype),
        sinks=weights.sinks,
    )
