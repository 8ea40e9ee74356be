"""Converts the layers: factorises each at its final ranks, and refits it behind the converted ones before it."""

from __future__ import annotations

from ...devices.choice import CPU
from ...layers import MLAWeights, moved
from ...progress import counting
from ..job import ConversionJob
from ..refit import Refitting


def convert_layers(job: ConversionJob) -> None:
    """Leaves every converted layer in the work folder, and its error on the text in the journal."""
    work, journal, budgets, processes = job.work, job.work.journal, job.budgets, job.processes
    refitting = None
    if job.windows is not None:
        stream = job.stream(job.measurements)
        refitting = Refitting(job.source, stream, work.converted_states, work.contexts, processes)
    with (
        job.second_measurements() as second,
        counting(job.progress, "converting", len(budgets), journal.converted) as step,
    ):

        def factorise(layer: int) -> MLAWeights:
            return moved(job.factorise(layer, budgets[layer], second), CPU)

        def keep(layer: int, weights: MLAWeights, error: float | None) -> None:
            work.write_layer(layer, weights)
            journal.converted = layer + 1
            journal.errors.append(error)
            work.save()
            work.converted_states.delete(layer)
            job.measurements.forget(layer)

        for layer in range(journal.converted, len(budgets)):
            weights = moved(processes.from_first(factorise, layer), job.source.device)
            error = None
            if refitting is not None:
                source_weights = processes.together(job.source_weights, layer)
                refit = job.method.refit(job.geometries[layer], source_weights, weights)
                weights, error = refitting.run(layer, source_weights, weights, refit)
            processes.from_first(keep, layer, weights, error)
            step()
