"""From a recipe and a source's configuration to ranks, sizes and costs: made first, shown, then executed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from statistics import mean
from typing import Any

import torch
from rich.table import Table

from ..errors import BudgetError
from ..layers import AttentionGeometry, LayerBudget
from ..methods import Method, get_method
from ..methods.base import TwoPassMethod
from ..recipe import Recipe, cache_elements, cache_share
from ..sources import SourceModel
from .coding import ByteBudget, coded, expected_of, may_code, whole_bytes
from .costs import Costs, count_parameters, estimate_costs
from .deepseek_layout import QK_ROPE_HEAD_DIM, engine_rank, layout_budgets, refuse_unfit
from .expected_loss import saved_by_twice_the_text
from .text_use import TextUse

DEFAULT_COMPRESSION = "50%"

SERVED_ROTARY_DIMS = (64, 32)
"""Widths of a rotary key that kernels of serving engines take; the narrower one is padded with zeros."""


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do. Cache sizes are bytes a token over all layers, in ``dtype``.

    A coded cache is compared with the source's in the type that the source keeps its own in.

    ``layers`` are the budgets by layer; a method that measures the text may move ranks between layers at an equal
    total. ``costs`` are estimates, and so is ``saved_by_twice_the_text``, nats a token; 0 is not known.
    """

    recipe: Recipe
    family: str
    layers: tuple[LayerBudget, ...]
    dtype: torch.dtype
    window: int
    windows: int
    parameters: int
    source_cache_bytes: int
    cache_bytes: int
    saved_by_twice_the_text: float
    costs: Costs

    def as_json(self) -> dict[str, Any]:
        """Plain values, for ``--json`` and the report."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "family": self.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": [asdict(layer) for layer in self.layers],
            "calibration_windows": self.windows,
            "calibration_window": self.window,
            "expected_nats_saved_by_twice_the_text": round(self.saved_by_twice_the_text, 4),
            "parameters": self.parameters,
            "cache_bytes_per_token_source": self.source_cache_bytes,
            "cache_bytes_per_token": self.cache_bytes,
            "cache_bytes_per_token_in_engines": self.engine_cache_bytes,
            "estimated_disk_bytes": self.costs.disk_bytes,
            "estimated_memory_bytes": self.costs.memory_bytes,
            "estimated_seconds": round(self.costs.seconds, 1),
        }

    def table(self, title: str, *, costs: bool = True) -> Table:
        """What the terminal shows; the same for the same conversion without the ``costs``, which are this machine's."""
        table = Table(title=title, show_header=False, title_justify="left")
        ratio = self.cache_bytes / self.source_cache_bytes
        sizes = sorted({(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in self.layers})
        rows = {
            "family": f"{self.family}, {len(self.layers)} layers, {self.parameters / 1e6:.1f}M parameters",
            "method": self.recipe.method,
            "latent + rotary key": ", ".join(f"{rank} + {rotary}" for rank, rotary in sizes),
            "kept in": self.kept_in,
            "cache, bytes a token": f"{self.source_cache_bytes} → {self.cache_bytes} ({ratio:.1%})",
            "weights written as": str(self.dtype).removeprefix("torch."),
            "calibration": f"{self.windows} windows of {self.window} tokens" if self.windows else "none needed",
        }
        if self.saved_by_twice_the_text:
            rows["twice the text"] = f"about {-math.expm1(-self.saved_by_twice_the_text):.1%} less perplexity"
        if self.engine_cache_bytes is not None:
            share = self.engine_cache_bytes / self.source_cache_bytes
            rows["in engines"] = f"{self.engine_cache_bytes} bytes a token ({share:.1%}), the rank padded to theirs"
        if costs:
            rows["expected"] = str(self.costs)
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    @property
    def engine_cache_bytes(self) -> int | None:
        """Bytes a token in engines, whose ranks are a few; None but for the layout that they read."""
        if self.recipe.layout == "free":
            return None
        wide = engine_rank(max(layer.kv_lora_rank for layer in self.layers))
        assert wide is not None, "the plan has been refused"
        return len(self.layers) * (wide + QK_ROPE_HEAD_DIM) * self.dtype.itemsize

    @property
    def kept_in(self) -> str:
        """The type or the code of what is cached, for reports."""
        code = self.layers[0].code
        if code is None:
            return self.precision
        return f"{self.precision}, a scale a token for either; the first {code.exact_tokens} tokens as they are"

    @property
    def precision(self) -> str:
        """The type of what is cached, or the bits of a latent's and of a rotary key's values."""
        if self.layers[0].code is None:
            return str(self.dtype).removeprefix("torch.")
        kinds = sorted({(layer.latent_bits, layer.rope_bits) for layer in self.layers})
        return f"{', '.join(f'{latent} + {rope}' for latent, rope in kinds)} bits"


def make_plan(recipe: Recipe, source: SourceModel) -> ConversionPlan:
    """Plans a conversion from the configuration alone.

    Raises:
        BudgetError: the budget is below the method's smallest or above the source's, or pinned ranks do not fit.
        ConversionError: the method is unknown.
    """
    method = get_method(recipe.method)
    geometries = [source.geometry(layer) for layer in range(source.num_layers)]
    dtype = recipe.torch_dtype or source.dtype
    budgets = _budgets(recipe, method, geometries, source, dtype)
    text = TextUse.of(source, recipe.tokens if method.needs_calibration else 0, twice=isinstance(method, TwoPassMethod))
    return ConversionPlan(
        recipe=recipe,
        family=source.model_type,
        layers=tuple(budgets),
        dtype=dtype,
        window=text.window,
        windows=text.windows,
        parameters=count_parameters(source),
        source_cache_bytes=source.cache_bytes_per_token(dtype if budgets[0].code is None else None),
        cache_bytes=sum(budget.cache_bytes(dtype.itemsize) for budget in budgets),
        saved_by_twice_the_text=_saved(budgets, geometries, text) if method.allocates else 0.0,
        costs=estimate_costs(
            source, dtype, text, recipe.torch_device, weighed=method.allocates and recipe.leaves_ranks
        ),
    )


def _saved(budgets: list[LayerBudget], geometries: list[AttentionGeometry], text: TextUse) -> float:
    shares = (budget.cache_elements / of.cache_elements for budget, of in zip(budgets, geometries, strict=True))
    return mean(saved_by_twice_the_text(share, text.windows * text.window) for share in shares)


def _budgets(
    recipe: Recipe, method: Method, geometries: list[AttentionGeometry], source: SourceModel, dtype: torch.dtype
) -> list[LayerBudget]:
    if recipe.layout == "deepseek":
        return _deepseek_budgets(recipe, method, geometries, source, dtype)
    rank, rotary = recipe.kv_lora_rank, recipe.qk_rope_head_dim
    fixed = all(method.smallest(geometry) == method.largest(geometry) for geometry in geometries)
    cache = recipe.cache or ("100%" if fixed else DEFAULT_COMPRESSION)
    pinned = rank is not None and rotary is not None and recipe.cache is None
    share = None if pinned else cache_share(cache, source.cache_bytes_per_token())
    in_bits = may_code(recipe, method, counts_bytes=share is not None)
    if rank is not None and rotary is not None and pinned:
        budgets = [LayerBudget(rank, rotary)] * len(geometries)
    elif in_bits and share is not None:
        budgets = _of_bytes(recipe, method, geometries, share, source.cache_bytes_per_token(), dtype, cache)
    else:
        budgets = _of_values(recipe, method, geometries, cache, dtype)
    # A width that the user names is for the layers that rotate.
    layers = zip(geometries, budgets, strict=True)
    budgets = [budget if geometry.rotary_dim else replace(budget, qk_rope_head_dim=0) for geometry, budget in layers]
    if in_bits and share is None and recipe.latent_bits is not None:
        budgets = [coded(budget, recipe.latent_bits) for budget in budgets]
        budgets = budgets if rank is not None else [whole_bytes(budget) for budget in budgets]
    for layer, (geometry, budget) in enumerate(zip(geometries, budgets, strict=True)):
        _check(method, geometry, budget, layer)
    return budgets


def _of_bytes(
    recipe: Recipe,
    method: Method,
    geometries: list[AttentionGeometry],
    share: Fraction,
    source_bytes: int,
    dtype: torch.dtype,
    cache: str,
) -> list[LayerBudget]:
    """A share of the source's bytes, spent on bits and values, or on values alone where that costs less."""
    if share > 1:
        raise BudgetError(f"a cache of {cache} is more than the source's; ask for 100% or less.")
    bytes_a_value = share * source_bytes / sum(geometry.cache_elements for geometry in geometries)
    limits = [bytes_a_value * geometry.cache_elements for geometry in geometries]
    in_bits = ByteBudget(recipe, method, cache, dtype.itemsize).spent(geometries, limits)
    if recipe.latent_bits is not None:
        return in_bits
    try:
        uncoded = _of_values(recipe, method, geometries, cache, dtype)
    except BudgetError:
        return in_bits
    return min(uncoded, in_bits, key=lambda budgets: expected_of(budgets, geometries))


def _of_values(
    recipe: Recipe, method: Method, geometries: list[AttentionGeometry], cache: str, dtype: torch.dtype
) -> list[LayerBudget]:
    elements = cache_elements(cache, geometries, dtype.itemsize)
    layers = zip(geometries, elements, strict=True)
    return [_budget(recipe, method, geometry, values, cache) for geometry, values in layers]


def _deepseek_budgets(
    recipe: Recipe, method: Method, geometries: list[AttentionGeometry], source: SourceModel, dtype: torch.dtype
) -> list[LayerBudget]:
    refuse_unfit(source)
    elements = cache_elements(recipe.cache or DEFAULT_COMPRESSION, geometries, dtype.itemsize)
    budgets = layout_budgets(recipe, geometries, elements)
    for layer, (geometry, budget) in enumerate(zip(geometries, budgets, strict=True)):
        _check(method, geometry, budget, layer)
    return budgets


def _budget(recipe: Recipe, method: Method, geometry: AttentionGeometry, elements: int, cache: str) -> LayerBudget:
    smallest = method.smallest(geometry).cache_elements
    if elements < smallest:
        share = -(-100 * smallest // geometry.cache_elements)
        raise BudgetError(
            f"a cache of {cache} is {elements} values a token and layer, below the {smallest} that method "
            f"{method.name} needs; ask for {share}% or more{_or_compress(method, geometry)}."
        )
    rank, rotary = recipe.kv_lora_rank, recipe.qk_rope_head_dim
    if rank is not None and rotary is not None and rank + rotary > elements:
        raise BudgetError(
            f"kv_lora_rank {rank} and qk_rope_head_dim {rotary} are {rank + rotary} values a token, more than the "
            f"{elements} of a cache of {cache}; leave out one of the three."
        )
    if rank is None and rotary is None and not recipe.uniform:
        return method.split(geometry, elements)
    if rank is None and rotary is None:
        # A third is about what the method gives the rotary key by itself.
        wide, narrow = SERVED_ROTARY_DIMS
        rotary = wide if elements >= 3 * wide else narrow
    rotary = (elements - (rank or 0)) // 2 * 2 if rotary is None else rotary
    rank = elements - rotary if rank is None else rank
    largest = method.largest(geometry).qk_rope_head_dim
    return LayerBudget(rank, min(rotary, largest) if recipe.qk_rope_head_dim is None else rotary)


def _or_compress(method: Method, geometry: AttentionGeometry) -> str:
    fixed = method.smallest(geometry) == method.largest(geometry)
    return ", or compress with --method attention_aware" if fixed else ""


def _check(method: Method, geometry: AttentionGeometry, budget: LayerBudget, layer: int) -> None:
    smallest, largest = method.smallest(geometry), method.largest(geometry)
    if not smallest.qk_rope_head_dim <= budget.qk_rope_head_dim <= largest.qk_rope_head_dim:
        raise BudgetError(
            f"qk_rope_head_dim {budget.qk_rope_head_dim} does not fit layer {layer}; method {method.name} takes "
            f"{smallest.qk_rope_head_dim} to {largest.qk_rope_head_dim}."
        )
    limit = geometry.cache_elements - budget.qk_rope_head_dim
    if not smallest.kv_lora_rank <= budget.kv_lora_rank <= limit:
        raise BudgetError(
            f"kv_lora_rank {budget.kv_lora_rank} does not fit layer {layer} beside qk_rope_head_dim "
            f"{budget.qk_rope_head_dim}; method {method.name} takes {smallest.kv_lora_rank} to {limit}, for the "
            f"source caches {geometry.cache_elements} values a token."
        )
    method.check(geometry, budget)
