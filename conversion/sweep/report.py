"""Reports what a sweep found: as JSON, as a page, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import VerificationError
from ..pipeline.runner import in_first
from ..pipeline.work.partial_output import versions
from ..reporting.report_files import write_report_files
from .job import SweepJob, by_context
from .picture import draw_sweep
from .recommendation import recommendation, recommended
from .result import PICTURE_NAME, ByContext, SourceFigures, SourceName, SweepResult


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
    source_ms, decode_ms = speeds(journal.timed)
    sizes = [size.model_copy(update={"decode_ms": decode_ms.get(name)}) for name, size in journal.sizes.items()]
    sizes.sort(key=lambda size: -size.bytes_share)
    quantised = journal.quantised_source or []
    name, dtype = source.location.name, str(job.dtype).removeprefix("torch.")
    return SweepResult(
        source=SourceName(name=name, revision=source.location.revision),
        text=journal.text,
        windows=journal.windows,
        window=journal.window,
        dtype=dtype,
        source_figures=SourceFigures(
            perplexity=journal.perplexity_source,
            cache_bytes_per_token=source.cache_bytes_per_token(),
            memory=by_context(job.cache_memory(source.config)),
            decode_ms=source_ms,
        ),
        sizes=sizes,
        quantised_source=quantised,
        refused=journal.refused,
        recommended=recommended(sizes).cache,
        recommendation=recommendation(name, job.recipe.folder.name, journal.perplexity_source, sizes, quantised),
        seconds=round(journal.seconds, 1),
        versions=versions(),
    )


def speeds(timed: Mapping[str, Sequence[ByContext]]) -> tuple[ByContext | None, dict[str, ByContext]]:
    """Milliseconds of a step, of the source and of every size, which were measured one size after the other.

    Args:
        timed: the source's and the conversion's, measured side by side, by size.

    Returns:
        The source's least; and of every size as many times that as it took in its own measurement, so that sizes which
        were measured while the machine did something else can be compared.
    """
    if not timed:
        return None, {}
    found: dict[str, ByContext] = {name: {} for name in timed}
    least: ByContext = {}
    for context in next(iter(timed.values()))[0]:
        pairs = {name: (of[0][context], of[1][context]) for name, of in timed.items()}
        known = [source for source, _ in pairs.values() if source is not None]
        least[context] = min(known, default=None)
        for name, (source, converted) in pairs.items():
            found[name][context] = None if source is None or converted is None else converted / source * min(known)
    return least, found
