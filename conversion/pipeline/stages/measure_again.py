"""Measures again, on an intermediate model, where the method asks for a second pass over the calibration text."""

from __future__ import annotations

from ...layers import MLAWeights
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
            return method.intermediate(job.geometries[layer], job.source_weights(layer), statistics, widths[layer])

        measure_layers(job, "measuring again", measurements, intermediate)
