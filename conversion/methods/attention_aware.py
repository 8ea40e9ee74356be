"""Attention-aware conversion: the closed-form recipe that measures every loss by what attention outputs.

1. Statistics of the source on text (`statistics`): which tokens, scores and query directions move the output.
2. A shared rotary key (`rotary_pca`): complex components over the kv heads, chosen by what a constant cannot explain.
3. What lost its rotation keeps its mean rotation, a complex constant.
4. One latent (`joint_latent`) for those keys and the values together.
5. Ranks by layer (`allocation`), and the output projection refitted (`value_ridge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BudgetError
from ..layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights
from .allocation import allocate_ranks
from .base import LayerRefit, Method
from .heads import repeat_groups
from .joint_latent import JointLatent, joint_latent, latent_spectrum, latent_targets
from .rotary_pca import RotaryKey, as_pairs, from_pairs, mean_rotation, rotary_queries, shared_rotary_key
from .statistics import AttentionStatistics, output_gram, pair_energy
from .value_ridge import ValueRidge

KEY_GAIN = 2.5
"""Keys against values in the joint latent. Above 1 because an error in a score meets all later tokens."""
FOLD_BELOW = 0.5
"""Of the source's cache: below it two neighbouring frequencies may share a rotary component."""
SMALLEST_RANK = 16


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
    mean: Tensor
    """``[D+1]``, of ``x~``"""
    key_metric: Tensor
    """``M_K [n_kv, d, d]``: query second moments"""
    value_metric: Tensor
    """``M_V [n_kv, d, d]``: through ``o_proj``"""
    rho: Tensor
    """``[n_kv, pairs]``, complex"""
    query_energy: Tensor
    """``[n_kv, pairs]``"""

    @classmethod
    def of(cls, geometry: AttentionGeometry, weights: AttentionWeights, statistics: dict[str, Tensor]) -> _Measured:
        d, kv = geometry.head_dim, geometry.num_kv_heads

        def rows(weight: Tensor, bias: Tensor | None) -> Tensor:
            constant = weight.new_zeros(weight.shape[0]) if bias is None else bias
            return torch.cat((weight, constant[:, None]), dim=1).double().unflatten(0, (-1, d))

        def over_group(per_head: Tensor) -> Tensor:
            return per_head.double().unflatten(0, (kv, geometry.num_groups)).sum(1)

        tokens = float(statistics["mean"][-1])
        key_metric = over_group(statistics["query_moment"]) / (tokens * d)
        energy = pair_energy_of_moment(geometry, key_metric)
        gram = statistics["attention_squared"].double()[:, None, None] * output_gram(geometry, weights.o.double())
        return cls(
            query=rows(weights.q, weights.q_bias),
            key=rows(weights.k, weights.k_bias),
            value=rows(weights.v, weights.v_bias),
            moment=statistics["moment"].double(),
            mean=statistics["mean"].double() / tokens,
            key_metric=key_metric,
            value_metric=over_group(gram) / tokens,
            rho=mean_rotation(over_group(statistics["rotation"]) / (tokens * d), energy),
            query_energy=energy,
        )


def pair_energy_of_moment(geometry: AttentionGeometry, moment: Tensor) -> Tensor:
    """``sum w |q_f|^2`` of the rotary pairs from ``sum w q q^T``: ``[..., d, d] -> [..., pairs]``."""
    return pair_energy(geometry, moment.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt())


class AttentionAwareMethod(Method):
    """See the module."""

    name = "attention_aware"
    source = "this project"
    needs_calibration = True

    def smallest(self, geometry: AttentionGeometry) -> LayerBudget:
        return LayerBudget(kv_lora_rank=SMALLEST_RANK, qk_rope_head_dim=2 if geometry.rotary_dim else 0)

    def largest(self, geometry: AttentionGeometry) -> LayerBudget:
        """Beyond it nothing is lost that more rank could keep: every pair rotated, keys and values at full rank."""
        rotary = geometry.num_kv_heads * geometry.rotary_dim
        return LayerBudget(kv_lora_rank=geometry.cache_elements - rotary, qk_rope_head_dim=rotary)

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

    def statistics(self, geometry: AttentionGeometry, weights: AttentionWeights, seed: int) -> AttentionStatistics:
        return AttentionStatistics(geometry, weights, seed)

    def allocate(
        self,
        geometries: Sequence[AttentionGeometry],
        budgets: Sequence[LayerBudget],
        statistics: Sequence[dict[str, Tensor]],
        weights: Sequence[AttentionWeights],
    ) -> list[LayerBudget]:
        """Moves ranks to where the joint latent still loses most, relative to the layer's residual stream."""
        gains = []
        for geometry, budget, sums, layer in zip(geometries, budgets, statistics, weights, strict=True):
            measured = _Measured.of(geometry, layer, sums)
            targets, _ = self._targets(measured, self._rotary_key(geometry, measured, budget), geometry)
            spectrum, _ = latent_spectrum(targets, measured.moment)
            power = (sums["log_power"] / sums["mean"][-1]).exp()
            gains.append(spectrum / power)
        largest = max(geometry.cache_elements - geometry.head_dim for geometry in geometries)
        total = sum(budget.kv_lora_rank for budget in budgets)
        smallest = min(SMALLEST_RANK, min(budget.kv_lora_rank for budget in budgets))
        ranks = allocate_ranks(gains, total, smallest, largest)
        return [LayerBudget(rank, budget.qk_rope_head_dim) for rank, budget in zip(ranks, budgets, strict=True)]

    def factorise(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor] | None,
        budget: LayerBudget,
    ) -> MLAWeights:
        """See `Method.factorise`."""
        assert statistics is not None, "the attention-aware method needs statistics"
        measured = _Measured.of(geometry, weights, statistics)
        rotary = self._rotary_key(geometry, measured, budget)
        targets, plain_units = self._targets(measured, rotary, geometry)
        latent = joint_latent(targets, plain_units, measured.moment, budget.kv_lora_rank)
        return _assemble(geometry, weights, measured, rotary, latent)

    def refit(
        self, geometry: AttentionGeometry, weights: AttentionWeights, converted: MLAWeights, seed: int
    ) -> LayerRefit:
        return ValueRidge(geometry, weights, converted, seed)

    def _rotary_key(self, geometry: AttentionGeometry, measured: _Measured, budget: LayerBudget) -> RotaryKey:
        fold = 2 if budget.cache_elements < FOLD_BELOW * geometry.cache_elements else 1
        keys = as_pairs(measured.key, geometry.rotary_dim // 2)
        return shared_rotary_key(
            keys,
            measured.moment,
            measured.query_energy,
            measured.rho,
            geometry.inv_freq,
            components=budget.qk_rope_head_dim // 2,
            fold=fold,
        )

    def _targets(self, measured: _Measured, rotary: RotaryKey, geometry: AttentionGeometry) -> tuple[Tensor, Tensor]:
        pairs = geometry.rotary_dim // 2
        remainder = as_pairs(measured.key, pairs) - rotary.decoder @ rotary.encoder
        constant = geometry.attention_factor**2 * measured.rho[..., None]
        keys = torch.cat((from_pairs(constant * remainder), measured.key[:, geometry.rotary_dim :]), dim=1)
        return latent_targets(keys, measured.value, measured.key_metric, measured.value_metric, KEY_GAIN)


def _assemble(
    geometry: AttentionGeometry, weights: AttentionWeights, measured: _Measured, rotary: RotaryKey, latent: JointLatent
) -> MLAWeights:
    """Puts the parts in DeepSeek's layout; constants of keys drop out, those of values become the output bias."""
    pairs, groups = geometry.rotary_dim // 2, geometry.num_groups
    query = torch.cat((measured.query, rotary_queries(groups, as_pairs(measured.query, pairs), rotary)), dim=1)
    query = query.flatten(0, 1)
    rotary_rows = from_pairs(rotary.encoder)
    up = torch.cat((latent.up_key, latent.up_value), dim=1).repeat_interleave(groups, dim=0).flatten(0, 1)
    down = latent.down[:, :-1]
    lost = measured.value @ measured.mean - latent.up_value @ (down @ measured.mean[:-1])
    output_bias = weights.o.double() @ repeat_groups(geometry, lost.flatten())
    if weights.o_bias is not None:
        output_bias = output_bias + weights.o_bias.double()
    key_bias = None
    if weights.k_bias is not None:
        key_bias = torch.cat((down.new_zeros(len(down)), rotary_rows[:, -1]))
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
    )
