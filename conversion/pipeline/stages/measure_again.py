"""Measures again, on an intermediate model, where the method asks for a second pass over the calibration text."""

from __future__ import annotations

from ...layers import MLAWeights, moved
from ...methods.base import TwoPassMethod
from ..job import ConversionJob
from .measure import measure_layers


def measure_again(job: ConversionJob) -> None:
    """Leaves the second statistics of every layer beside the first."""
    method = job.method
    with job.second_measurements() as measurements:
        if measurements is None or not isinstance(method, TwoPassMethod):
            return
        widths = [budget.qk_rope_head_dim for budget in job.budgets]

        def intermediate(layer: int) -> MLAWeights:
            statistics = job.measurements.read_statistics(layer)
            geometry, weights = job.solved_source.geometry(layer), job.solved_weights(layer)
            return moved(method.intermediate(geometry, weights, statistics, widths[layer]), job.source.device)

        measure_layers(job, "measuring again", measurements, intermediate)
