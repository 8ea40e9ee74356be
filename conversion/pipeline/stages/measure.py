"""Measures every layer of the source on the calibration text: the statistics that the method asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import SourceError
from ...layers import MLAWeights
from ...methods.base import LayerStatistics
from ...progress import counting
from ..job import ConversionJob
from ..work.measurements import Measurements

_LAYER_SEEDS = 100_003
"""How far apart two conversions' seeds are for layers, so that no layers of the two share one."""


def measure(job: ConversionJob) -> None:
    """Leaves the statistics of every layer, and the hidden states that enter it, in the job's measurements."""
    if job.windows is not None:
        measure_layers(job, "measuring", job.measurements, lambda _: None)


def measure_layers(
    job: ConversionJob, description: str, measurements: Measurements, converted: Callable[[int], MLAWeights | None]
) -> None:
    """Measures every layer, from the first on that ``measurements`` lack.

    Args:
        job: gives source, method and text.
        description: of the step, for the progress.
        measurements: where statistics and hidden states go.
        converted: what takes the place of a layer's attention behind its own statistics; None for nothing.

    Raises:
        SourceError: a layer computes values that are not finite.
    """
    assert job.windows is not None
    stream, processes, total = job.stream(measurements), job.processes, len(job.geometries)
    done, windows = processes.from_first(lambda: measurements.measured), stream.own_windows
    with counting(job.progress, description, total * windows, done * windows) as step:

        def summed(layer: int) -> LayerStatistics:
            seed = job.plan.recipe.seed * _LAYER_SEEDS + layer
            statistics = job.method.statistics(job.geometries[layer], job.source_weights(layer), seed)
            assert statistics is not None

            def observe(place: int, attention_input: Tensor, residual: Tensor) -> None:
                statistics.windows = place
                statistics.update(attention_input, residual)

            stream.observe_and_advance(layer, observe, step, converted(layer))
            return statistics

        def keep(layer: int, sums: dict[str, Tensor]) -> None:
            if not all(torch.isfinite(values).all() for values in sums.values()):
                raise SourceError(
                    f"layer {layer} of {job.source.location.model} computes values on the calibration text that "
                    "are not finite in float32; look for weights that are far too large."
                )
            measurements.write_statistics(layer, sums)
            measurements.advance(layer + 1)

        for layer in range(done, total):
            statistics = processes.together(summed, layer)
            statistics.sums.add_up(processes)
            processes.from_first(keep, layer, statistics.tensors())
