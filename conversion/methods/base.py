"""The contract of a factorisation method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from ..layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights


class LayerStatistics(ABC):
    """Running sums over the calibration text for one layer: constant memory in the number of tokens.

    The calibration pass feeds it one window at a time; ``tensors()`` is what is stored between runs, and what
    :meth:`Method.factorise` reads. A method that needs no text has no statistics.
    """

    @abstractmethod
    def update(self, attention_input: Tensor, residual: Tensor) -> None:
        """Adds one batch of windows.

        Args:
            attention_input: ``[B, S, D]``, the layer's hidden states after the input norm (what q, k, v read).
            residual: ``[B, S, D]``, the layer's hidden states before the input norm (the residual stream).
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums, on the CPU, ready for a safetensors file."""


@dataclass(frozen=True)
class LayerInputs:
    """One window before one layer: ``attention_input`` and ``residual``, ``[S, D]`` each, as in `LayerStatistics`."""

    attention_input: Tensor
    residual: Tensor


class LayerRefit(ABC):
    """The refit of a layer's output projection: corrects what its factorisation and the layers before it left.

    The loop feeds it windows of the calibration text, then takes the corrected layer. It needs the final budget of the
    layer, so it runs after :meth:`Method.allocate`. Constant memory in the number of tokens.
    """

    @abstractmethod
    def update(self, source: LayerInputs, converted: LayerInputs) -> Tensor:
        """Adds one window: as it reaches this layer in the source, and after the converted layers before this one.

        Returns:
            ``[S, H*d_v]``, what the output projection reads in the converted layer.
        """

    @abstractmethod
    def weights(self) -> MLAWeights:
        """The corrected layer; the uncorrected one where no window was added."""


class Method(ABC):
    """One way from a source attention layer to an MLA layer."""

    name: ClassVar[str]
    source: ClassVar[str]
    """Where the mathematics is published."""
    needs_calibration: ClassVar[bool]
    lossless: ClassVar[bool] = False
    """Whether the converted layer gives what the source's does, up to rounding."""
    codes: ClassVar[bool] = False
    """Whether :meth:`factorise` prepares a layer for few bits, as its budget says."""
    allocates: ClassVar[bool] = False
    """Whether :meth:`allocate` moves ranks, for which the sensitivity to every layer is measured first."""

    @abstractmethod
    def smallest(self, geometry: AttentionGeometry) -> LayerBudget:
        """The smallest budget that the method can meet for this layer."""

    @abstractmethod
    def largest(self, geometry: AttentionGeometry) -> LayerBudget:
        """The largest budget that still means something: the full rank, or the source's own size."""

    @abstractmethod
    def split(self, geometry: AttentionGeometry, cache_elements: int) -> LayerBudget:
        """Divides a cache size between latent and rotary key. Raises `BudgetError` where it cannot."""

    def check(self, geometry: AttentionGeometry, budget: LayerBudget) -> None:  # noqa: B027 (most have nothing to add)
        """Raises `BudgetError` for a budget between the smallest and the largest that still does not fit."""

    def statistics(self, geometry: AttentionGeometry, weights: AttentionWeights, seed: int) -> LayerStatistics | None:
        """A fresh accumulator for one layer, or None where no text is needed.

        ``seed`` fixes what is sampled within the layer: give each layer its own, the same one when resuming.
        """
        return None

    def allocate(
        self,
        geometries: Sequence[AttentionGeometry],
        budgets: Sequence[LayerBudget],
        statistics: Sequence[dict[str, Tensor]],
        weights: Sequence[AttentionWeights],
        sensitivity: Sequence[float],
    ) -> list[LayerBudget]:
        """May move ranks between layers at an equal total; the default keeps the plan.

        Args:
            geometries: by layer, of the source.
            budgets: by layer, as planned.
            statistics: by layer, the sums of `LayerStatistics`, loaded on access: look at one at a time, and once.
            weights: by layer, of the source; they may be loaded on access as well.
            sensitivity: by layer, nats a token: KL to the source of the model in which only this layer is converted,
                at its budget of ``budgets`` and without a refit.
        """
        return list(budgets)

    @abstractmethod
    def factorise(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor] | None,
        budget: LayerBudget,
    ) -> MLAWeights:
        """The converted layer. Pure: the same input gives the same bytes."""

    def refit(self, geometry: AttentionGeometry, weights: AttentionWeights, converted: MLAWeights) -> LayerRefit | None:
        """What corrects ``converted`` (what :meth:`factorise` gave), or None where nothing does."""
        return None


class TwoPassMethod(Method):
    """A method that measures twice: on the source, then on an intermediate model made from what that found.

    Both passes use the accumulators of :meth:`Method.statistics`.
    """

    @override
    @abstractmethod
    def factorise(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor] | None,
        budget: LayerBudget,
        second: dict[str, Tensor] | None = None,
    ) -> MLAWeights:
        """The converted layer from the sums of both passes: ``statistics`` of the first, ``second`` of the second."""

    @abstractmethod
    def intermediate(
        self,
        geometry: AttentionGeometry,
        weights: AttentionWeights,
        statistics: dict[str, Tensor],
        qk_rope_head_dim: int,
    ) -> MLAWeights:
        """The layer that the second pass runs through.

        It is made from the ``statistics`` of the first pass. It knows no rank, so that one second pass serves all
        budgets with a rotary key of ``qk_rope_head_dim`` channels.
        """
