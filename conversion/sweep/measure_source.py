"""Measures the source itself: how its own cache does in few bits."""

from __future__ import annotations

import torch

from ..evaluation.loading import load_model, reason_to_leave_out
from ..evaluation.source_in_few_bits import kivi_share, score_in_few_bits
from ..pipeline.runner import in_first
from ..progress import counting
from .job import SweepJob
from .result import QuantisedSource


@in_first
def measure_source(job: SweepJob) -> None:
    """Leaves that in the journal; nothing of a source that cannot be loaded whole."""
    journal, source = job.work.journal, job.source
    if journal.quantised_source is not None:
        return
    reason = reason_to_leave_out(source.meta_model, source.device, None)
    if reason is not None:
        note = f"note: the source is not measured: {reason}."
        job.progress.console.print(note, soft_wrap=True)
        journal.quantised_source = []
        return
    windows = torch.cat(tuple(job.texts.values()))
    with counting(job.progress, "source in few bits", len(windows)) as step:
        model = load_model(source.location, source.device)
        scores = score_in_few_bits(model, windows, ", ".join(job.texts), step)
    journal.quantised_source = [
        QuantisedSource(
            bits=bits,
            bytes_share=kivi_share(bits, score.window),
            perplexity=score.perplexity,
            kl=score.kl,
            top1_agreement=score.top1_agreement,
        )
        for bits, score in scores.items()
    ]
