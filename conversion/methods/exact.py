"""The exact form: any attention with rotary keys, rewritten as MLA with equal outputs and an equally large cache.

Every kv head keeps its own rotary key; a query head, zero elsewhere, meets only the keys of its own group. Values, and
key channels without rotation, become the latent, from which ``kv_b_proj`` merely selects. No text, no rounding, no
condition on the weights' rank. MHA and MQA are the cases of as many kv heads as heads, and of one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import BudgetError
from ..forward.heads import constants_cancel, value_bias_through_output
from ..layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights
from .base import Method


class ExactMethod(Method):
    """The exact form of this module, which consists of selections and zero padding only."""

    name = "exact"
    source = "this project; the merged key head of TransMLA (arXiv 2502.07864, section 4.1) with its rotation kept"
    needs_calibration = False
    lossless = True

    @override
    def smallest(self, geometry: AttentionGeometry) -> LayerBudget:
        kv, passive = geometry.num_kv_heads, geometry.head_dim - geometry.rotary_dim
        return LayerBudget(kv_lora_rank=kv * (geometry.head_dim + passive), qk_rope_head_dim=kv * geometry.rotary_dim)

    largest = smallest

    @override
    def split(self, geometry: AttentionGeometry, cache_elements: int) -> LayerBudget:
        budget = self.smallest(geometry)
        if cache_elements < budget.cache_elements:
            raise BudgetError(
                f"the exact method caches {budget.cache_elements} values a token and layer, more than the "
                f"{cache_elements} asked for; use --method attention_aware to compress."
            )
        return budget

    @override
    def factorise(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor] | None,
        budget: LayerBudget,
    ) -> MLAWeights:
        """The source's layer in another form; ``statistics`` are not read, and ``budget`` has one possible value."""
        kv, d, rotary = geometry.num_kv_heads, geometry.head_dim, geometry.rotary_dim
        passive = d - rotary
        key_rows = torch.arange(kv * d, device=weights.k.device).view(kv, d)
        rotary_rows = torch.cat((key_rows[:, : rotary // 2].flatten(), key_rows[:, rotary // 2 : rotary].flatten()))
        passive_keys = weights.k[key_rows[:, rotary:].flatten()]
        nothing = weights.k.new_zeros(kv * d)
        key_bias = nothing if weights.k_bias is None else weights.k_bias
        passive_bias = key_bias[key_rows[:, rotary:].flatten()]
        # Biases whose effect is a constant of the output, or none at all, stay out of the cache.
        if constants_cancel(geometry, weights):
            passive_bias = torch.zeros_like(passive_bias)
        value_bias = None if weights.sinks is None else weights.v_bias
        has_cached_bias = weights.k_bias is not None or value_bias is not None
        value_bias = nothing if value_bias is None else value_bias
        cached_bias = torch.cat((passive_bias, value_bias, key_bias[rotary_rows]))
        return MLAWeights(
            q_proj=_spread_queries(geometry, weights.q),
            kv_a_proj_with_mqa=torch.cat((passive_keys, weights.v, weights.k[rotary_rows])),
            kv_b_proj=_select_groups(geometry, weights.v),
            o_proj=weights.o,
            inv_freq=geometry.inv_freq.repeat(kv),
            qk_nope_head_dim=passive,
            v_head_dim=d,
            q_proj_bias=None if weights.q_bias is None else _spread_queries(geometry, weights.q_bias[:, None])[:, 0],
            kv_a_proj_with_mqa_bias=cached_bias if has_cached_bias else None,
            o_proj_bias=value_bias_through_output(geometry, weights),
            sinks=weights.sinks,
        )


def _spread_queries(geometry: AttentionGeometry, q: Tensor) -> Tensor:
    """Puts every head's rotary rows, of ``q [H*d, n]``, where its group's rotary keys lie.

    Returns:
        ``[H*(d - d_rot + n_kv*d_rot), n]``: per head the un-rotated rows, then the real and the imaginary halves of
        all groups' pairs, zero but for its own group.
    """
    kv, groups, half = geometry.num_kv_heads, geometry.num_key_value_groups, geometry.rotary_dim // 2
    q = q.view(kv, groups, geometry.head_dim, -1)
    spread = q.new_zeros(kv, groups, 2, kv, half, q.shape[-1])
    for group in range(kv):
        spread[group, :, 0, group] = q[group, :, :half]
        spread[group, :, 1, group] = q[group, :, half : 2 * half]
    return torch.cat((q[:, :, 2 * half :], spread.flatten(2, 4)), dim=2).flatten(0, 2)


def _select_groups(geometry: AttentionGeometry, like: Tensor) -> Tensor:
    """``kv_b_proj [H*(passive + d), n_kv*(passive + d)]`` of ones and zeros: the group's share of the latent."""
    kv, groups, d = geometry.num_kv_heads, geometry.num_key_value_groups, geometry.head_dim
    passive = d - geometry.rotary_dim
    select = like.new_zeros(kv, groups, passive + d, kv * (passive + d))
    for group in range(kv):
        select[group, :, :passive, group * passive : (group + 1) * passive] = torch.eye(passive, device=like.device)
        first = kv * passive + group * d
        select[group, :, passive:, first : first + d] = torch.eye(d, device=like.device)
    return select.flatten(0, 2)
