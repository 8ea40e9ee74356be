"""Reports what was done and found, in files beside the weights."""

from __future__ import annotations

from ...reporting.card import write_card
from ...reporting.report import Report, write_report
from ..job import ConversionJob
from ..runner import in_first


@in_first
def report(job: ConversionJob) -> None:
    """Leaves the report and the model card in the checkpoint."""
    made = made_report(job)
    write_report(made, job.source, job.work.checkpoint)
    write_card(made, job.work.checkpoint)


def made_report(job: ConversionJob) -> Report:
    """The report of a conversion that is verified."""
    journal = job.work.journal
    assert journal.verification is not None
    return Report(job.plan, job.source.location, job.budgets, journal.errors, journal.sensitivity, journal.verification)
