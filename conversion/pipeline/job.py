"""One conversion in progress: what its stages read, and what more than one of them does with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..devices.choice import solving_device
from ..devices.processes import Processes
from ..evaluation.source_outputs import SourceOutputs
from ..forward.residual_stream import ResidualStream
from ..layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights, moved
from ..methods import Method, get_method
from ..methods.base import TwoPassMethod
from ..planning.plan import ConversionPlan
from ..sources import SourceModel
from .work.journal import WorkFolder
from .work.measurements import IntermediateMeasurements, Measurements


@dataclass(frozen=True)
class ConversionJob:
    """What was asked for, what it is made from, and the folder in which it is made.

    ``given_windows`` are the calibration text, token ids ``[N, S]``; None where the method needs none, or where the
    source writes it. ``measurements`` keep what the method measures on it. ``processes`` share it.
    ``outputs`` are the source's on held-out text, where other conversions of it are verified too.
    """

    plan: ConversionPlan
    source: SourceModel
    tokenizer: PreTrainedTokenizerBase
    given_windows: Tensor | None
    work: WorkFolder
    measurements: Measurements
    progress: Progress
    processes: Processes
    outputs: SourceOutputs | None = None

    @cached_property
    def method(self) -> Method:
        """The factorisation that the recipe names."""
        return get_method(self.plan.recipe.method)

    @cached_property
    def windows(self) -> Tensor | None:
        """The calibration text ``[N, S]``, whoever wrote it, once it is written; None where the method needs none."""
        if self.plan.windows and self.plan.recipe.is_self_written:
            return self.measurements.read_text()
        return self.given_windows

    @cached_property
    def geometries(self) -> list[AttentionGeometry]:
        """The attention of every source layer, by its sizes."""
        return [self.source.geometry(layer) for layer in range(self.source.num_layers)]

    @property
    def moves_ranks(self) -> bool:
        """Whether the final ranks differ from the plan's."""
        return self.windows is not None and self.method.allocates and self.plan.recipe.leaves_ranks

    @property
    def budgets(self) -> list[LayerBudget]:
        """The final ones, once they are allocated."""
        return [LayerBudget(*budget) for budget in self.work.journal.budgets]

    def source_weights(self, layer: int) -> AttentionWeights:
        """The attention of a source layer; in float32 for a method that measures, as statistics are taken so."""
        return self._weights(self.source, layer)

    @cached_property
    def solved_source(self) -> SourceModel:
        """The source where its layers are factorised."""
        return self.source.on(solving_device(self.source.device))

    def solved_weights(self, layer: int) -> AttentionWeights:
        """As `source_weights`, of `solved_source`."""
        return self._weights(self.solved_source, layer)

    def _weights(self, source: SourceModel, layer: int) -> AttentionWeights:
        return source.attention(layer, torch.float32 if self.windows is not None else None)

    def stream(self, measurements: Measurements) -> ResidualStream:
        """The calibration text on its way through the layers, hidden states kept beside ``measurements``."""
        assert self.windows is not None
        return ResidualStream(self.source, self.windows, measurements, self.processes)

    def factorise(self, layer: int, budget: LayerBudget, second: Measurements | None = None) -> MLAWeights:
        """The converted layer; ``second`` holds what a `TwoPassMethod` has measured again."""
        geometry, weights, statistics = self.solved_source.geometry(layer), self.solved_weights(layer), None
        if self.method.needs_calibration:
            statistics = self.measurements.read_statistics(layer)
        if isinstance(self.method, TwoPassMethod) and second is not None:
            assert statistics is not None
            again = second.read_statistics(layer)
            converted = self.method.factorise(geometry, weights, statistics, budget, again)
        else:
            converted = self.method.factorise(geometry, weights, statistics, budget)
        return moved(converted, self.source.device)

    @contextmanager
    def second_measurements(self) -> Iterator[Measurements | None]:
        """Where the second pass of a `TwoPassMethod` keeps what it measures, locked; None for another method.

        All processes enter together.
        """
        if self.windows is None or not isinstance(self.method, TwoPassMethod):
            yield None
            return
        widths = [budget.qk_rope_head_dim for budget in self.budgets]
        measurements = IntermediateMeasurements(self.measurements, widths)
        with ExitStack() as held:
            self.processes.from_first(lambda: held.enter_context(measurements) and None)
            yield measurements
