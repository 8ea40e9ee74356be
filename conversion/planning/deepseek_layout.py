"""The layout that every engine's DeepSeek can say: which sources fit it, and what it gives each layer.

One rank for all layers, a rotary key of 64 channels with one component for each frequency of DeepSeek's table, and no
constants. Lists of sizes are those of vLLM 0.33: of its cache, and of its prefill kernels beside 64 rotary channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from modeling_mla.vllm_mla import CACHE_WIDTHS

from ..errors import BudgetError, SourceError
from ..layers import AttentionGeometry, AttentionWeights, LayerBudget
from ..recipe import Recipe
from ..sources import SourceModel

QK_ROPE_HEAD_DIM = 64
KV_LORA_RANKS = tuple(width - QK_ROPE_HEAD_DIM for width in CACHE_WIDTHS)
"""256, 448 and 512, beside 64 rotary channels."""
HEAD_DIMS = ((64, 128), (128, 128), (192, 256))
"""(qk_nope_head_dim, v_head_dim)."""
_SCALINGS = ("default", "linear", "llama3")
"""They act on each frequency alone, and on nothing else."""
_METHOD = "attention_aware"


def engine_rank(rank: int) -> int | None:
    """The least rank of engines that holds ``rank``; None where none does."""
    return next((wide for wide in KV_LORA_RANKS if rank <= wide), None)


def engine_head_dims(nope: int, value: int) -> tuple[int, int] | None:
    """The least of `HEAD_DIMS` that holds a head of these sizes; None where none does."""
    return next((sizes for sizes in HEAD_DIMS if nope <= sizes[0] and value <= sizes[1]), None)


def refuse_unfit(source: SourceModel) -> None:
    """Raises `SourceError`, by name and with what serves it instead, for attention that the layout cannot hold."""
    reason = why_unfit(source)
    if reason is not None:
        raise SourceError(
            f"{source.location.model} {reason}, which DeepSeek's form cannot hold; convert it without --layout, and "
            "serve it with Transformers or mlx-lm (mla export --to mlx)."
        )


def why_unfit(source: SourceModel) -> str | None:
    """What a source's attention has that the layout cannot hold; None for nothing."""
    for layer in range(source.num_layers):
        weights = source.without_weights().attention(layer) if layer == 0 else None
        reason = _why_unfit(source.geometry(layer), weights)
        if reason is not None:
            return f"has {reason}"
    scalings = {rope["rope_type"] for rope in source.rope_parameters} - set(_SCALINGS)
    return f"scales its frequencies by {scalings.pop()!r}" if scalings else None


def _why_unfit(geometry: AttentionGeometry, weights: AttentionWeights | None) -> str | None:
    if geometry.behind_norms:
        return "norms of queries and keys"
    if geometry.softcap is not None:
        return f"a softcap of {geometry.softcap} on its scores"
    if geometry.sliding_window is not None:
        return f"a sliding window of {geometry.sliding_window} tokens"
    if geometry.rotary_dim % QK_ROPE_HEAD_DIM and QK_ROPE_HEAD_DIM % max(geometry.rotary_dim, 1):
        return f"{geometry.rotary_dim} rotary channels a head, whose frequencies are not those of 64"
    if weights is None:
        return None
    if weights.sinks is not None:
        return "attention sinks"
    if any(bias is not None for bias in (weights.q_bias, weights.k_bias, weights.v_bias, weights.o_bias)):
        return "biases on its attention projections"
    return None


def layout_budgets(
    recipe: Recipe, geometries: Sequence[AttentionGeometry], elements: Sequence[int]
) -> list[LayerBudget]:
    """One rank for all layers, and a rotary key for those that rotate.

    Args:
        recipe: with this layout.
        geometries: of every source layer.
        elements: values to cache for a token in each layer, where the recipe pins no rank.

    Raises:
        BudgetError: the recipe asks for what the layout does not have.
    """
    if recipe.method != _METHOD:
        raise BudgetError(f"--layout deepseek is a form of method {_METHOD}; leave out --method {recipe.method}.")
    if recipe.latent_bits not in (None, 16):
        raise BudgetError(
            f"latent_bits is {recipe.latent_bits}, and engines cache DeepSeek's form uncoded; leave out --latent-bits."
        )
    if recipe.qk_rope_head_dim not in (None, QK_ROPE_HEAD_DIM):
        raise BudgetError(
            f"qk_rope_head_dim is {recipe.qk_rope_head_dim}, and DeepSeek's layout has {QK_ROPE_HEAD_DIM}; leave it "
            "out."
        )
    rotary = max(min(geometry.rotary_dim, QK_ROPE_HEAD_DIM) for geometry in geometries)
    rank = recipe.kv_lora_rank or min(elements) - rotary
    if engine_rank(rank) is None:
        raise BudgetError(
            f"kv_lora_rank would be {rank}, and engines have {KV_LORA_RANKS[-1]} at most; ask for a smaller --cache, "
            f"or for --kv-lora-rank {KV_LORA_RANKS[-1]}."
        )
    return [LayerBudget(rank, min(geometry.rotary_dim, rotary), deepseek=True) for geometry in geometries]
