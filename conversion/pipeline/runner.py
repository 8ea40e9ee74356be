"""Runs the stages of a job one after the other, and goes on from the first that an earlier run did not finish.

It knows no stage: a stage is a function of the job, which reads and leaves everything in the job's work folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

from ..checkpoint.atomic import refusing_full_disk
from ..checkpoint.paths import folder_bytes
from .work.locked_folder import LockedFolder
from .work.partial_output import PartialOutput, StagedJournal


class Job(Protocol):
    """What the stages work on."""

    @property
    def work(self) -> PartialOutput[Any]:
        """The folder in which the output is made, with a `StagedJournal`."""


AnyJob = TypeVar("AnyJob", bound=Job)


def run_stages(job: AnyJob, stages: Sequence[Callable[[AnyJob], None]], others: Sequence[LockedFolder] = ()) -> int:
    """Runs what is left of ``stages`` in the job's work folder, which it locks, and publishes the output.

    The name of a stage stands in the journal when its function has returned. A stage that is stopped runs again, and
    may go on from what it left. Meanwhile ``others`` are locked, folders that the stages use besides.

    Returns:
        The bytes that all these folders held at most behind a stage.

    Raises:
        ConversionError: as the stages do; the folder is deleted where the same would come again.
    """
    with ExitStack() as held:
        held.enter_context(job.work)
        held.enter_context(refusing_full_disk(job.work.path))
        for folder in others:
            held.enter_context(folder)
        journal: StagedJournal = job.work.journal
        largest = 0
        for stage in stages:
            if stage.__name__ not in journal.finished:
                stage(job)
                journal.finished.append(stage.__name__)
                job.work.save()
            largest = max(largest, sum(folder_bytes(folder.path) for folder in (job.work, *others)))
        job.work.publish()
        return largest
