"""Weighs the layers: how much each of them, converted alone at the planned ranks, changes the model's predictions."""

from __future__ import annotations

from ...planning.text_use import weighed_windows
from ...progress import counting
from ..job import ConversionJob
from ..runner import in_first
from ..sensitivity import layer_sensitivity


@in_first
def weigh(job: ConversionJob) -> None:
    """Leaves the sensitivity of every layer in the journal, where ranks are moved between layers."""
    if not job.moves_ranks:
        return
    assert job.windows is not None
    planned = job.plan.layers
    with counting(job.progress, "weighing layers", len(planned)) as step:
        job.work.journal.sensitivity = layer_sensitivity(
            job.source, weighed_windows(job.windows), lambda layer: job.factorise(layer, planned[layer]), step
        )
