"""Allocates the final ranks: the plan's, unless the method moves them to the layers where they save most."""

from __future__ import annotations

from dataclasses import astuple

from ..job import ConversionJob
from ..lazy_layers import LazyLayers


def allocate(job: ConversionJob) -> None:
    """Leaves the final budget of every layer in the journal."""
    budgets, total = list(job.plan.layers), len(job.plan.layers)
    if job.moves_ranks:
        statistics = LazyLayers(total, job.measurements.read_statistics)
        weights = LazyLayers(total, job.source_weights)
        sensitivity = job.work.journal.sensitivity
        budgets = job.method.allocate(job.geometries, budgets, statistics, weights, sensitivity)
    job.work.journal.budgets = [astuple(budget) for budget in budgets]
