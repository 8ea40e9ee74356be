"""Reports what a sweep found: as JSON, as a page, and as a picture."""

from __future__ import annotations

from ..errors import VerificationError
from ..pipeline.runner import in_first
from ..pipeline.work.partial_output import versions
from ..reporting.report_files import write_report_files
from .job import SweepJob, by_context
from .picture import draw_sweep
from .recommendation import recommendation
from .result import PICTURE_NAME, SourceFigures, SourceName, SweepResult


@in_first
def report(job: SweepJob) -> None:
    """Leaves all three in the folder.

    Raises:
        VerificationError: every size was refused.
    """
    job.work.save()
    found = _result(job)
    write_report_files(found.as_json(), job.work.path)
    draw_sweep(found, job.work.path / PICTURE_NAME)


def _result(job: SweepJob) -> SweepResult:
    """What was found of all sizes that the folder has, the largest first."""
    journal, source = job.work.journal, job.source
    if not journal.sizes:
        raise VerificationError(next(iter(journal.refused.values())))
    sizes = sorted(journal.sizes.values(), key=lambda size: -size.bytes_share)
    quantised = journal.quantised_source or []
    name = source.location.name
    return SweepResult(
        source=SourceName(name=name, revision=source.location.revision),
        text=journal.text,
        windows=journal.windows,
        window=journal.window,
        dtype=str(job.dtype).removeprefix("torch."),
        source_figures=SourceFigures(
            perplexity=journal.perplexity_source,
            cache_bytes_per_token=source.cache_bytes_per_token(),
            memory=by_context(job.cache_memory(source.config)),
            decode_ms=journal.source_decode_ms,
        ),
        sizes=sizes,
        quantised_source=quantised,
        refused=journal.refused,
        recommendation=recommendation(name, job.recipe.folder.name, journal.perplexity_source, sizes, quantised),
        seconds=round(journal.seconds, 1),
        versions=versions(),
    )
