"""Bytes spent on values or on bits: what a budget of bytes buys, and when a cache may be coded.

A value more in the cache and a bit more for every value are two ways to spend bytes. Down to about four bits the first
is the better one, for a latent that is prepared loses little by being rounded. So a budget of bytes is spent on bits as
well unless the recipe says otherwise; only where nearly all values fit uncoded does rounding them cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from modeling_mla.latent_code_mla import BITS, EXACT, LatentCode

from ..errors import BudgetError
from ..layers import AttentionGeometry, LayerBudget
from ..methods import METHODS, Method
from ..recipe import Recipe
from .expected_loss import expected_loss

_ROPE_BITS = (5, 6, 8)
"""Fewer for the rotary key cost more than any width of it can win back."""
_TOKENS = 1024
"""Within which a budget holds for all that a cache holds."""
_FIRST_TOKENS = LatentCode.exact_tokens + 1
"""That are kept as they are, with a row to spare."""


def candidate_bits(latent_bits: int | None) -> list[tuple[int, int]]:
    """The bits of latents and rotary keys that a plan chooses from; ``latent_bits`` pins the former."""
    return [
        (latent, rope)
        for latent in BITS
        for rope in _ROPE_BITS
        if rope >= latent and latent_bits in (None, latent) and latent != EXACT
    ]


def may_code(recipe: Recipe, method: Method, *, counts_bytes: bool) -> bool:
    """Whether a conversion may make a coded cache; it must where the recipe names bits below `EXACT`.

    Args:
        recipe: what was asked for.
        method: of the recipe.
        counts_bytes: whether its budget is one of bytes, not of values.

    Raises:
        BudgetError: a code was asked for where there can be none.
    """
    if recipe.latent_bits == EXACT:
        return False
    if recipe.latent_bits is None:
        return counts_bytes and method.codes and not recipe.uniform
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


def expected_of(budgets: Sequence[LayerBudget], geometries: Sequence[AttentionGeometry]) -> float:
    """The `expected_loss` of all layers."""
    layers = zip(budgets, geometries, strict=True)
    return sum(
        expected_loss(budget.cache_elements / of.cache_elements, budget.latent_bits, budget.rope_bits)
        for budget, of in layers
    )


def whole_bytes(budget: LayerBudget) -> LayerBudget:
    """A budget whose rank leaves no part of a byte unused."""
    step = budget.rank_step
    return replace(budget, kv_lora_rank=budget.kv_lora_rank // step * step)


@dataclass(frozen=True)
class ByteBudget:
    """Bytes that a recipe gives to a coded cache.

    Args:
        recipe: may pin the rank, the rotary width and the latent's bits.
        method: of the recipe.
        cache: as `Recipe.cache`, for messages.
        itemsize: bytes of a value in the model's type, which first tokens have.
    """

    recipe: Recipe
    method: Method
    cache: str
    itemsize: int

    def spent(self, geometries: Sequence[AttentionGeometry], limits: Sequence[Fraction]) -> list[LayerBudget]:
        """What is bought for every source layer: the bits of least `expected_loss`, equal in all, and what they leave.

        Of the bytes that are too few to widen all layers, as many layers as can be have more rank than the others.

        Args:
            geometries: of the layers.
            limits: bytes of a token in each, over `_TOKENS` tokens.

        Raises:
            BudgetError: they are too few for the method, or for what is pinned.
        """
        whole = [int(limit) for limit in limits]
        found: list[list[LayerBudget]] = []
        for bits in candidate_bits(self.recipe.latent_bits):
            widest = [self._widest(*layer, bits) for layer in zip(geometries, whole, strict=True)]
            budgets = [budget for budget in widest if budget is not None]
            if len(budgets) == len(geometries):
                found.append(budgets)
        if not found:
            raise BudgetError(self._too_few(geometries, whole))
        best = min(found, key=lambda budgets: expected_of(budgets, geometries))
        return self._filled(geometries, best, float(sum(limits)))

    def _widest(self, geometry: AttentionGeometry, limit: int, bits: tuple[int, int]) -> LayerBudget | None:
        """The widest budget of these bits within ``limit`` bytes of a token; None where the method has none."""
        smallest, largest = self.method.smallest(geometry), self.method.largest(geometry)
        for elements in range(largest.cache_elements, smallest.cache_elements - 1, -1):
            budget = self._of_elements(geometry, elements, bits)
            fits = budget.kv_lora_rank >= smallest.kv_lora_rank and budget.qk_rope_head_dim >= smallest.qk_rope_head_dim
            if fits and self._held(budget) <= limit:
                return budget
        return None

    def _of_elements(self, geometry: AttentionGeometry, elements: int, bits: tuple[int, int]) -> LayerBudget:
        """At most so many values, in these bits: what is pinned, and the rest of them."""
        rank, rotary = self.recipe.kv_lora_rank, self.recipe.qk_rope_head_dim
        if rotary is None:
            rotary = (
                self.method.split(geometry, elements).qk_rope_head_dim if rank is None else (elements - rank) // 2 * 2
            )
        # None where the layer does not rotate, whatever the user names.
        rotary = min(rotary, self.method.largest(geometry).qk_rope_head_dim)
        budget = LayerBudget(elements - rotary if rank is None else rank, rotary, *bits)
        return budget if rank is not None else whole_bytes(budget)

    def _filled(
        self, geometries: Sequence[AttentionGeometry], budgets: list[LayerBudget], limit: float
    ) -> list[LayerBudget]:
        """``budgets`` with ranks raised layer by layer while ``limit``, the bytes of a token in all layers, allows."""
        if self.recipe.kv_lora_rank is not None:
            return budgets
        filled, left = list(budgets), limit - sum(map(self._held, budgets))
        while True:
            for layer, (geometry, budget) in enumerate(zip(geometries, filled, strict=True)):
                wider = replace(budget, kv_lora_rank=budget.kv_lora_rank + budget.rank_step)
                cost = self._held(wider) - self._held(budget)
                if cost <= left and wider.cache_elements <= self.method.largest(geometry).cache_elements:
                    filled[layer], left = wider, left - cost
            if filled == budgets:
                return filled
            budgets = list(filled)

    def _held(self, budget: LayerBudget) -> float:
        """Bytes of a token, its share of the first tokens included."""
        first = _FIRST_TOKENS * budget.cache_elements * self.itemsize
        return budget.cache_bytes(self.itemsize) + first / _TOKENS

    def _too_few(self, geometries: Sequence[AttentionGeometry], limits: Sequence[int]) -> str:
        """Why no budget fits, and what would."""
        names = ("kv_lora_rank", "qk_rope_head_dim", "latent_bits")
        pins = [f"{name} {getattr(self.recipe, name)}" for name in names if getattr(self.recipe, name) is not None]
        if pins:
            return (
                f"{' and '.join(pins)} do not fit into a cache of {self.cache}, {limits[0]} bytes a token and layer, "
                f"beside what method {self.method.name} needs; ask for a larger one, or leave out what is pinned."
            )
        needed = [self._held(coded(self.method.smallest(geometry), BITS[0])) for geometry in geometries]
        shares = [need / max(limit, 1) for need, limit in zip(needed, limits, strict=True)]
        layer = max(range(len(shares)), key=shares.__getitem__)
        return (
            f"a cache of {self.cache} is {limits[layer]} bytes a token in layer {layer}, below the {needed[layer]:.1f} "
            f"that method {self.method.name} needs; ask for {shares[layer]:.2f} times as much or more."
        )
