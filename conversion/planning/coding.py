"""Bytes spent on values or on bits: what a budget of bytes buys, and when a cache is coded.

A value more in the cache and a bit more for every value are two ways to spend bytes. Down to about four bits the first
is the better one, for a latent that is prepared loses little by being rounded. Below half of the source's bytes a cache
is coded unless the recipe says otherwise: uncoded it would lose far more. From there on it is not, for values alone
lose little, and every engine reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from modeling_mla.latent_code_mla import BITS, EXACT, LatentCode

from ..errors import BudgetError
from ..layers import AttentionGeometry, LayerBudget
from ..methods import METHODS, Method
from ..recipe import Recipe

UNCODED_FROM = Fraction(1, 2)
"""Of the source's bytes."""
_ROPE_BITS = (5, 6, 8)
"""Fewer for the rotary key cost more than any width of it can win back."""
_TOKENS = 1024
"""Within which a budget holds for all that a cache holds."""
_FIRST_TOKENS = LatentCode.exact_tokens + 1
"""That are kept as they are, with a row to spare."""
_RANK_LOSS = 0.21
_LATENT_ROUNDING = 3.0
_ROPE_ROUNDING = 50.0
"""Of `expected_loss`, in nats a token: fitted to a model of 135 million parameters at shares of 1/8 to 3/4, without any
code, and to codes of 3 to 6 bits at shares of 1/2 to 1."""


def expected_loss(share: float, latent_bits: int, rope_bits: int) -> float:
    """What a layer's budget is expected to cost, in nats a token of the model: what is cut off, and what is rounded.

    It is for choosing before anything is measured.

    Args:
        share: of the source's values that are cached, above 0.
        latent_bits: of a latent's value.
        rope_bits: of a value of the rotary key.
    """
    cut = max(0.0, 1 - share)
    rounded = _LATENT_ROUNDING * _rounding(latent_bits) + _ROPE_ROUNDING * _rounding(rope_bits)
    return _RANK_LOSS * cut**2 / share + rounded


def _rounding(bits: int) -> float:
    return 0.0 if bits == EXACT else 4.0**-bits


def candidate_bits(latent_bits: int | None) -> list[tuple[int, int]]:
    """The bits of latents and rotary keys that a plan chooses from; ``latent_bits`` pins the former."""
    return [
        (latent, rope)
        for latent in BITS
        for rope in _ROPE_BITS
        if rope >= latent and latent_bits in (None, latent) and latent != EXACT
    ]


def is_coded(recipe: Recipe, method: Method, share: Fraction | None) -> bool:
    """Whether a conversion makes a coded cache.

    Args:
        recipe: what was asked for.
        method: of the recipe.
        share: of the source's bytes; None for a budget that counts values, or for none.

    Raises:
        BudgetError: a code was asked for where there can be none.
    """
    if recipe.latent_bits == EXACT:
        return False
    if recipe.latent_bits is None:
        return share is not None and share < UNCODED_FROM and method.codes and not recipe.uniform
    if not method.codes:
        able = ", ".join(name for name, other in METHODS.items() if other.codes)
        raise BudgetError(
            f"method {method.name} prepares no latents for {recipe.latent_bits} bits; leave out --latent-bits, or "
            f"choose --method {able}."
        )
    if recipe.uniform:
        raise BudgetError(
            f"uniform ranks are for engines, which read no cache of {recipe.latent_bits} bits; leave out --uniform or "
            "--latent-bits."
        )
    return True


def coded(budget: LayerBudget, latent_bits: int) -> LayerBudget:
    """A budget of so many values, its latent in so many bits and its rotary key in two more, if it has them."""
    rope_bits = next(bits for bits in _ROPE_BITS if bits >= min(latent_bits + 2, _ROPE_BITS[-1]))
    return replace(budget, latent_bits=latent_bits, rope_bits=rope_bits)


def coded_budgets(
    recipe: Recipe,
    method: Method,
    geometries: Sequence[AttentionGeometry],
    cache: str,
    limits: Sequence[int],
    itemsize: int,
) -> list[LayerBudget]:
    """The budgets of all layers within a number of bytes: the bits of least `expected_loss`, equal in all.

    Args:
        recipe: may pin the rank, the rotary width and the latent's bits.
        method: of the recipe.
        geometries: of every source layer.
        cache: as `Recipe.cache`, for messages.
        limits: bytes of a token in each layer, over `_TOKENS` tokens.
        itemsize: bytes of a value in the model's type, which first tokens have.

    Raises:
        BudgetError: they are too few for the method, or for what is pinned.
    """
    found: list[tuple[float, list[LayerBudget]]] = []
    for bits in candidate_bits(recipe.latent_bits):
        budgets = [
            _widest(recipe, method, geometry, limit, itemsize, bits)
            for geometry, limit in zip(geometries, limits, strict=True)
        ]
        whole = [budget for budget in budgets if budget is not None]
        if len(whole) == len(budgets):
            loss = sum(
                expected_loss(budget.cache_elements / geometry.cache_elements, *bits)
                for budget, geometry in zip(whole, geometries, strict=True)
            )
            found.append((loss, whole))
    if not found:
        raise BudgetError(_too_few(recipe, method, geometries, cache, limits, itemsize))
    return min(found, key=lambda candidate: candidate[0])[1]


def _too_few(
    recipe: Recipe,
    method: Method,
    geometries: Sequence[AttentionGeometry],
    cache: str,
    limits: Sequence[int],
    itemsize: int,
) -> str:
    """Why no budget fits, and what would."""
    pins = [name for name in ("kv_lora_rank", "qk_rope_head_dim", "latent_bits") if getattr(recipe, name) is not None]
    if pins:
        pinned = " and ".join(f"{name} {getattr(recipe, name)}" for name in pins)
        return (
            f"{pinned} do not fit into a cache of {cache}, {limits[0]} bytes a token and layer, beside what method "
            f"{method.name} needs; ask for a larger one, or leave out what is pinned."
        )
    smallest = [method.smallest(geometry) for geometry in geometries]
    needed = [_held(coded(budget, BITS[0]), itemsize) for budget in smallest]
    more, layer = max(
        (need / max(limit, 1), layer) for layer, (need, limit) in enumerate(zip(needed, limits, strict=True))
    )
    return (
        f"a cache of {cache} is {limits[layer]} bytes a token in layer {layer}, below the {needed[layer]:.1f} that "
        f"method {method.name} needs; ask for {more:.2f} times as much or more."
    )


def _held(budget: LayerBudget, itemsize: int) -> float:
    """Bytes of a token, its share of the first tokens included."""
    return budget.cache_bytes(itemsize) + _FIRST_TOKENS * budget.cache_elements * itemsize / _TOKENS


def _widest(
    recipe: Recipe, method: Method, geometry: AttentionGeometry, limit: int, itemsize: int, bits: tuple[int, int]
) -> LayerBudget | None:
    """The widest budget of these bits within ``limit`` bytes of a token; None where the method has none."""
    smallest, largest = method.smallest(geometry), method.largest(geometry)
    for elements in range(largest.cache_elements, smallest.cache_elements - 1, -1):
        budget = _of_elements(recipe, method, geometry, elements, bits)
        fits = budget.kv_lora_rank >= smallest.kv_lora_rank and budget.qk_rope_head_dim >= smallest.qk_rope_head_dim
        if fits and _held(budget, itemsize) <= limit:
            return budget
    return None


def _of_elements(
    recipe: Recipe, method: Method, geometry: AttentionGeometry, elements: int, bits: tuple[int, int]
) -> LayerBudget:
    """At most so many values, in these bits: what is pinned, and the rest of them."""
    rank, rotary = recipe.kv_lora_rank, recipe.qk_rope_head_dim
    if rotary is None:
        rotary = method.split(geometry, elements).qk_rope_head_dim if rank is None else (elements - rank) // 2 * 2
        rotary = min(rotary, method.largest(geometry).qk_rope_head_dim)
    budget = LayerBudget(elements - rotary if rank is None else rank, rotary, *bits)
    return budget if rank is not None else whole_bytes(budget)


def whole_bytes(budget: LayerBudget) -> LayerBudget:
    """A budget whose rank leaves no part of a byte unused."""
    step = budget.rank_step
    return replace(budget, kv_lora_rank=budget.kv_lora_rank // step * step)
