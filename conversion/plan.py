"""From a recipe and a source's configuration to ranks, sizes and costs: made first, shown, then executed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from .activations import stream_dtype
from .checkpoint.measurements import BLOCK
from .checkpoint.writer import MAX_SHARD_BYTES
from .errors import BudgetError
from .layers import AttentionGeometry, LayerBudget
from .methods import Method, get_method
from .methods.base import TwoPassMethod
from .products import fast_float32
from .recipe import Recipe, cache_elements
from .refitting import refitted_windows
from .sources import SourceModel
from .verify import window_length

DEFAULT_COMPRESSION = "50%"

PROCESS_BYTES = 1100 * 10**6
"""The interpreter with PyTorch and Transformers, and what its allocator holds back."""
SERVED_ROTARY_DIMS = (64, 32)
"""Widths of a rotary key that kernels of serving engines take; the narrower one is padded with zeros."""
VERIFIED_WINDOWS = 6
"""Of held-out text, in the check before a checkpoint is published."""
_WORK_OF_MEASURING = 1.7
"""Time of statistics and forward pass of a token, in units of the forward pass's products [measured]."""
_WORK_OF_REFITTING = 2.4
"""The same of a token that the refit uses [measured]."""
_FIXED_SECONDS = 40.0
"""Start, loading, weighing layers and writing [measured on a small model]."""


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do. Cache sizes are bytes a token over all layers, in ``dtype``.

    ``layers`` are the budgets by layer; a method that measures the text may move ranks between layers at an equal
    total. ``disk_bytes``, ``memory_bytes`` and ``seconds`` are estimates.
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
    disk_bytes: int
    memory_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain values, for ``--json`` and the report."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "family": self.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": [
                {"kv_lora_rank": layer.kv_lora_rank, "qk_rope_head_dim": layer.qk_rope_head_dim}
                for layer in self.layers
            ],
            "calibration_windows": self.windows,
            "calibration_window": self.window,
            "parameters": self.parameters,
            "cache_bytes_per_token_source": self.source_cache_bytes,
            "cache_bytes_per_token": self.cache_bytes,
            "estimated_disk_bytes": self.disk_bytes,
            "estimated_memory_bytes": self.memory_bytes,
            "estimated_seconds": round(self.seconds, 1),
        }

    def table(self, title: str) -> Table:
        """For the terminal."""
        table = Table(title=title, show_header=False, title_justify="left")
        ratio = self.cache_bytes / self.source_cache_bytes
        sizes = sorted({(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in self.layers})
        rows = {
            "family": f"{self.family}, {len(self.layers)} layers, {self.parameters / 1e6:.1f}M parameters",
            "method": self.recipe.method,
            "latent + rotary key": ", ".join(f"{rank} + {rotary}" for rank, rotary in sizes),
            "cache, bytes a token": f"{self.source_cache_bytes} → {self.cache_bytes} ({ratio:.1%})",
            "weights written as": str(self.dtype).removeprefix("torch."),
            "calibration": f"{self.windows} windows of {self.window} tokens" if self.windows else "none needed",
            "expected": f"{self.seconds:.0f} s, {self.memory_bytes / 1e9:.1f} GB of memory, "
            f"{self.disk_bytes / 1e9:.2f} GB of disk",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return table


def make_plan(recipe: Recipe, source: SourceModel) -> ConversionPlan:
    """Plans a conversion from the configuration alone.

    Raises:
        BudgetError: the budget is below the method's smallest or above the source's, or pinned ranks do not fit.
        ConversionError: the method is unknown.
    """
    method = get_method(recipe.method)
    geometries = [source.geometry(layer) for layer in range(source.num_layers)]
    dtype = recipe.torch_dtype or source.dtype
    budgets = _budgets(recipe, method, geometries, dtype.itemsize)
    window = window_length(source)
    windows = max(1, recipe.tokens // window) if method.needs_calibration else 0
    twice = isinstance(method, TwoPassMethod)

    sizes = {name: tensor.numel() for name, tensor in source.meta_model.state_dict().items()}
    layer_parameters = sum(size for name, size in sizes.items() if source.in_layer(name)) // source.num_layers
    parameters = sum(tensor.numel() for tensor in source.meta_model.parameters())
    hidden = geometries[0].hidden_size
    stream_bytes = windows * window * hidden * stream_dtype(source).itemsize
    refitted = len(refitted_windows(windows))
    block_bytes = BLOCK * window * max(hidden, geometries[0].num_heads * geometries[0].head_dim) * 4
    statistics_bytes = (1 + twice) * 8 * (hidden + 1) ** 2 if windows else 0
    shard_bytes = min(MAX_SHARD_BYTES, parameters * dtype.itemsize)
    layer_bytes = 8 * layer_parameters + 4 * block_bytes + 4 * sizes[source.embedding]
    return ConversionPlan(
        recipe=recipe,
        family=source.model_type,
        layers=tuple(budgets),
        dtype=dtype,
        window=window,
        windows=windows,
        parameters=parameters,
        source_cache_bytes=source.cache_bytes_per_token(dtype),
        cache_bytes=sum(budget.cache_elements for budget in budgets) * dtype.itemsize,
        disk_bytes=int(1.5 * parameters * dtype.itemsize)
        + source.num_layers * (stream_bytes + statistics_bytes)
        + 3 * refitted * block_bytes // BLOCK,
        memory_bytes=PROCESS_BYTES + max(2 * shard_bytes, layer_bytes),
        seconds=_seconds(
            parameters, window * hidden * source.num_layers, (1 + twice) * windows * window, refitted * window, window
        ),
    )


def _budgets(recipe: Recipe, method: Method, geometries: list[AttentionGeometry], itemsize: int) -> list[LayerBudget]:
    rank, rotary = recipe.kv_lora_rank, recipe.qk_rope_head_dim
    if rank is not None and rotary is not None and recipe.cache is None:
        budgets = [LayerBudget(rank, rotary)] * len(geometries)
    else:
        fixed = all(method.smallest(geometry) == method.largest(geometry) for geometry in geometries)
        cache = recipe.cache or ("100%" if fixed else DEFAULT_COMPRESSION)
        budgets = [
            _budget(recipe, method, geometry, elements, cache)
            for geometry, elements in zip(geometries, cache_elements(cache, geometries, itemsize), strict=True)
        ]
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


@fast_float32()
def _seconds(parameters: int, attention: int, measured: int, refitted: int, window: int) -> float:
    """From this machine's speed at a matrix product: the passes over the text (in tokens), and the verification."""
    side = 512
    matrix = torch.ones(side, side)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    rate = 4 * 2 * side**3 / (time.perf_counter() - start)
    forward = 2 * (parameters + attention) / rate
    work = _WORK_OF_MEASURING * measured + _WORK_OF_REFITTING * refitted
    return forward * (work + 2 * VERIFIED_WINDOWS * window) + _FIXED_SECONDS
