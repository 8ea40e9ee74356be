"""Converts the model to each size, and measures what came of it."""

from __future__ import annotations

import shutil

from ..checkpoint.location import locate
from ..errors import EndedTogetherError, VerificationError
from ..evaluation.verify import Verification, verify_checkpoint
from ..pipeline.conversion import run_plan
from ..planning.plan import ConversionPlan
from ..progress import counting
from .job import SweepJob, by_context
from .result import size_of


def convert_sizes(job: SweepJob) -> None:
    """Leaves every size that is not finished in the journal, and its checkpoint in the folder where it is wanted.

    A size that gives nothing to publish is noted, with the reason, and the others follow.
    """
    longest = sum(plan.costs.seconds for plan in job.plans.values())
    job.progress.console.print(f"{', '.join(job.plans)}: at most {longest:.0f} s.", soft_wrap=True)
    for number, (cache, plan) in enumerate(job.plans.items(), 1):
        if job.processes.from_first(job.work.has, cache, figures_only=job.recipe.figures_only):
            continue
        job.progress.console.print(f"{cache}, {number} of {len(job.plans)}:")
        try:
            found = _converted(job, plan)
        except (VerificationError, EndedTogetherError) as error:
            if error.exit_code != VerificationError.exit_code:
                raise
            job.processes.from_first(_note_refusal, job, cache, str(error))
        else:
            job.processes.from_first(_keep, job, cache, plan, found)


def _converted(job: SweepJob, plan: ConversionPlan) -> Verification:
    output = plan.recipe.output
    if job.processes.from_first(output.exists):
        # It was published, and the run killed before that was noted.
        return verify_checkpoint(output, job.source, job.texts, job.progress, outputs=job.outputs)
    return run_plan(plan, job.source, job.progress, job.outputs).report.verification


def _note_refusal(job: SweepJob, cache: str, reason: str) -> None:
    job.work.journal.refused[cache] = reason
    job.work.save()
    job.progress.console.print(f"{cache}: {reason}", soft_wrap=True)


def _keep(job: SweepJob, cache: str, plan: ConversionPlan, found: Verification) -> None:
    output, journal = plan.recipe.output, job.work.journal
    location = locate(str(output))
    config = location.config()
    with counting(job.progress, "timing", 1) as step:
        timed = job.decode_speeds(location, config)
        step()
    memory = job.cache_memory(config)
    # First tokens, which a coded cache keeps as they are, and what is allocated ahead.
    besides = max(0, found.cache_bytes_held - memory.bytes_at(found.window))
    folder = None if job.recipe.figures_only else output.name
    journal.sizes[cache] = size_of(cache, plan.precision, found, folder, by_context(memory, besides))
    if timed is not None:
        journal.timed[cache] = timed
    journal.refused.pop(cache, None)
    journal.perplexity_source = found.perplexity_source
    journal.text, journal.windows, journal.window = found.text, found.windows, found.window
    job.work.save()
    if job.recipe.figures_only:
        shutil.rmtree(output)
