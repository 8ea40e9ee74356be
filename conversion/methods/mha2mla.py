"""MHA2MLA (arXiv 2502.14837): partial rotary keys by 2-norm, and a singular value decomposition of the weights.

1. Every kv head keeps the rotation of those pairs that contribute most to scores, by the mean norms of their queries
   and keys (section 3.1, the ``2-norm`` choice). The other channels lose their position.
2. The weights of keys without rotation and of values, one below the other, are cut to the latent's width by their
   singular value decomposition (section 3.2, the joint form). No activations are read.

The rotary keys of the kv heads lie side by side in one shared key, each head's query zero beside its own, so that the
cache is as large as the authors' and one kind of attention serves all methods. The authors train afterwards; as it
comes from here, a compressed model is unusable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from ..devices.decompositions import thin_svd
from ..devices.running_sums import RunningSums
from ..errors import BudgetError, SourceError
from ..forward.attention import source_heads
from ..forward.heads import augmented_rows, constants_cancel, value_bias_through_output
from ..layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights
from .attention_statistics import pair_energy
from .base import LayerStatistics, Method

ROTARY_SHARE = 4
"""One in so many rotary channels of a head stays rotated, as in most of the authors' models."""


class PairNorms(LayerStatistics):
    """``query [H, pairs]`` and ``key [n_kv, pairs]``: sums over tokens of the 2-norms of rotary pairs, float64."""

    def __init__(self, geometry: AttentionGeometry, weights: AttentionWeights) -> None:
        self.geometry, self.weights = geometry, weights
        pairs = geometry.rotary_dim // 2
        self.sums = RunningSums(weights.q.device, query=(geometry.num_heads, pairs), key=(geometry.num_kv_heads, pairs))

    @override
    def update(self, attention_input: Tensor, residual: Tensor) -> None:
        """Adds the norms of the windows' rotary pairs; the residual stream is not read."""
        for window in attention_input.float():
            heads = source_heads(self.geometry, self.weights, window, torch.arange(len(window), device=window.device))
            self.sums.add("query", pair_energy(self.geometry, heads.queries).sqrt().sum(1))
            self.sums.add("key", pair_energy(self.geometry, heads.keys).sqrt().sum(1))


class MHA2MLAMethod(Method):
    """Partial rotary keys and a singular value decomposition, as the module says; of the text it reads norms."""

    name = "mha2mla"
    source = "MHA2MLA (arXiv 2502.14837), sections 3.1 and 3.2"
    needs_calibration = True

    @override
    def smallest(self, geometry: AttentionGeometry) -> LayerBudget:
        rotary = 2 * geometry.num_kv_heads if geometry.rotary_dim else 0
        return LayerBudget(kv_lora_rank=1, qk_rope_head_dim=rotary)

    @override
    def largest(self, geometry: AttentionGeometry) -> LayerBudget:
        """All rotations, and everything else at full rank: nothing is lost."""
        rotary = geometry.num_kv_heads * geometry.rotary_dim
        return LayerBudget(kv_lora_rank=geometry.cache_elements - rotary, qk_rope_head_dim=rotary)

    @override
    def split(self, geometry: AttentionGeometry, cache_elements: int) -> LayerBudget:
        """All rotations at the source's own size; below it a quarter of them, but no more than half of the cache."""
        smallest, largest = self.smallest(geometry), self.largest(geometry)
        if not smallest.cache_elements <= cache_elements <= largest.cache_elements:
            raise BudgetError(
                f"method {self.name} cannot cache {cache_elements} values a token and layer; the limits of this layer "
                f"are {smallest.cache_elements} to {largest.cache_elements}."
            )
        if cache_elements == largest.cache_elements:
            return largest
        step = 2 * geometry.num_kv_heads
        rotary = min(largest.qk_rope_head_dim // ROTARY_SHARE, cache_elements // 2) // step * step
        rotary = max(rotary, smallest.qk_rope_head_dim)
        return LayerBudget(kv_lora_rank=cache_elements - rotary, qk_rope_head_dim=rotary)

    @override
    def check(self, geometry: AttentionGeometry, budget: LayerBudget) -> None:
        step = 2 * geometry.num_kv_heads
        if budget.qk_rope_head_dim % step:
            raise BudgetError(
                f"qk_rope_head_dim {budget.qk_rope_head_dim} is no multiple of {step}; method {self.name} gives each "
                f"of the {geometry.num_kv_heads} kv heads as many rotary pairs."
            )

    @override
    def statistics(self, geometry: AttentionGeometry, weights: AttentionWeights, seed: int) -> PairNorms:
        if geometry.behind_norms:
            # What lies behind key norms is a selection, of which no singular value decomposition says anything.
            raise SourceError(
                f"method {self.name} does not convert models that normalise queries and keys; choose another method."
            )
        biases = weights.k_bias is not None or weights.v_bias is not None
        if biases and not constants_cancel(geometry, weights):
            # Its latent has none.
            raise SourceError(
                f"method {self.name} does not convert models with biases beside a softcap or sinks; choose another "
                "method."
            )
        return PairNorms(geometry, weights)

    @override
    def factorise(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor] | None,
        budget: LayerBudget,
    ) -> MLAWeights:
        assert statistics is not None, "MHA2MLA needs the norms of rotary pairs"
        kv, groups, d = geometry.num_kv_heads, geometry.num_key_value_groups, geometry.head_dim
        query = augmented_rows(weights.q, weights.q_bias, d)
        key = augmented_rows(weights.k, weights.k_bias, d)
        value = augmented_rows(weights.v, None, d)
        pairs = strongest_pairs(statistics, budget.qk_rope_head_dim // (2 * kv))
        rotated, unrotated = channels(geometry, pairs)
        constant = _unrotated_factor(geometry, unrotated)
        latent_rows = torch.cat((constant * _pick(key, unrotated), value), dim=1)
        # Without biases: that of a key moves whole score rows, which softmax ignores; that of a value moves the output.
        down, up = weight_svd(latent_rows.flatten(0, 1)[:, :-1], budget.kv_lora_rank)
        up = up.unflatten(0, (kv, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)

        query = query.unflatten(0, (kv, groups))
        parts = [torch.cat((_pick(q, unrotated), _spread(_pick(q, rotated))), dim=1) for q in query.unbind(1)]
        query = torch.stack(parts, dim=1).flatten(0, 2)
        rotary = _pick(key, rotated).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
        key_bias = None
        if weights.k_bias is not None:
            key_bias = torch.cat((down.new_zeros(len(down)), rotary[:, -1]))
        dtype = weights.q.dtype
        return MLAWeights(
            q_proj=query[:, :-1].to(dtype),
            kv_a_proj_with_mqa=torch.cat((down, rotary[:, :-1])).to(dtype),
            kv_b_proj=up.to(dtype),
            o_proj=weights.o,
            inv_freq=geometry.inv_freq[pairs].flatten(),
            qk_nope_head_dim=unrotated.shape[1],
            v_head_dim=d,
            q_proj_bias=None if weights.q_bias is None else query[:, -1].to(dtype),
            kv_a_proj_with_mqa_bias=None if key_bias is None else key_bias.to(dtype),
            o_proj_bias=value_bias_through_output(geometry, weights),
            sinks=weights.sinks,
        )


def strongest_pairs(statistics: dict[str, Tensor], count: int) -> Tensor:
    """``[n_kv, count]``: each kv head's pairs of largest ``mean |q_f| * mean |k_f|``, queries summed over its heads."""
    key = statistics["key"]
    score = statistics["query"].unflatten(0, (len(key), -1)).sum(1) * key
    return score.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def channels(geometry: AttentionGeometry, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of each kv head with rotation, real parts first ``[n_kv, 2*count]``, and those without."""
    half = geometry.rotary_dim // 2
    rotated = torch.cat((pairs, pairs + half), dim=1)
    unrotated = rotated.new_ones(len(pairs), geometry.head_dim, dtype=torch.bool).scatter(1, rotated, False)
    return rotated, unrotated.nonzero()[:, 1].view(len(pairs), -1)


def weight_svd(weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best ``rank`` approximation ``up [m, rank] @ down [rank, n]`` of ``weights [m, n]``, without any data.

    Singular values are shared equally (section 3.2). Where ``rank`` exceeds what the weights have, the rest is zero.
    """
    left, singular, right = thin_svd(weights)
    root = singular[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    missing = rank - len(root)
    return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))


def _pick(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows ``chosen [n_kv, m]`` of ``rows [n_kv, d, n]``."""
    return rows.gather(1, chosen[..., None].expand(*chosen.shape, rows.shape[-1]))


def _spread(rows: Tensor) -> Tensor:
    """Rotary query rows ``[n_kv, 2*count, n]`` in the layout of all kv heads' keys, zero but for their own."""
    kv, both, width = rows.shape
    spread = rows.new_zeros(kv, 2, kv, both // 2, width)
    own = torch.arange(kv, device=rows.device)
    spread[own, :, own] = rows.view(kv, 2, -1, width)
    return spread.flatten(1, 3)


def _unrotated_factor(geometry: AttentionGeometry, unrotated: Tensor) -> Tensor:
    """What scales keys without rotation, ``[n_kv, m, 1]``: those that had one keep its attention factor."""
    had_rotation = unrotated[..., None] < geometry.rotary_dim
    return torch.where(had_rotation, geometry.attention_factor**2, 1.0).double()
