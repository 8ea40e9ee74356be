"""Converts the layers: factorises each at its final ranks, and refits it behind the converted ones before it."""

from __future__ import annotations

from ...progress import counting
from ..job import ConversionJob
from ..refit import Refitting


def convert_layers(job: ConversionJob) -> None:
    """Leaves every converted layer in the work folder, and its error on the text in the journal."""
    work, journal, budgets = job.work, job.work.journal, job.budgets
    refitting = None
    if job.windows is not None:
        refitting = Refitting(job.source, job.stream(job.measurements), work.converted_states, work.contexts)
    with (
        job.second_measurements() as second,
        counting(job.progress, "converting", len(budgets), journal.converted) as step,
    ):
        for layer in range(journal.converted, len(budgets)):
            weights, error = job.factorise(layer, budgets[layer], second), None
            if refitting is not None:
                source_weights = job.source_weights(layer)
                refit = job.method.refit(job.geometries[layer], source_weights, weights)
                weights, error = refitting.run(layer, source_weights, weights, refit)
            work.write_layer(layer, weights)
            journal.converted = layer + 1
            journal.errors.append(error)
            work.save()
            work.converted_states.delete(layer)
            job.measurements.forget(layer)
            step()
