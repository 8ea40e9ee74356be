"""Runs the stages of a job one after the other, and goes on from the first that an earlier run did not finish.

It knows no stage: a stage is a function of the job, which reads and leaves everything in the job's work folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from ..checkpoint.atomic import refusing_full_disk
from ..checkpoint.paths import folder_bytes
from ..devices.processes import Processes
from .work.locked_folder import LockedFolder


class Work(Protocol):
    """A folder in which an output is made: locked as a context manager, with a `StagedJournal`."""

    path: Path
    journal: Any

    def __enter__(self) -> Self:
        """Locks it, and reads the journal."""

    def __exit__(self, *exception: object) -> None:
        """Lets it go."""

    def save(self) -> None:
        """Writes the journal."""

    def publish(self) -> None:
        """Finishes the output."""


class Job(Protocol):
    """What the stages work on."""

    @property
    def work(self) -> Work:
        """The folder in which the output is made."""

    @property
    def processes(self) -> Processes:
        """Those that run the stages together."""


AnyJob = TypeVar("AnyJob", bound=Job)


def run_stages(job: AnyJob, stages: Sequence[Callable[[AnyJob], None]], others: Sequence[LockedFolder] = ()) -> int:
    """Runs what is left of ``stages`` in the job's work folder, which it locks, and publishes the output.

    The name of a stage stands in the journal when its function has returned. A stage that is stopped runs again, and
    may go on from what it left. Meanwhile ``others`` are locked, folders that the stages use besides.

    Returns:
        The bytes that all these folders held at most behind a stage.

    Of several processes the first one alone holds folders, and writes the journal; the others have copies of it.

    Raises:
        ConversionError: as the stages do; the folder is deleted where the same would come again.
    """
    work, processes = job.work, job.processes
    with ExitStack() as held:

        def enter() -> None:
            held.enter_context(work)
            held.enter_context(refusing_full_disk(work.path))
            for folder in others:
                held.enter_context(folder)

        processes.from_first(enter)
        work.journal = processes.from_first(lambda: work.journal)
        folders = [work.path, *(folder.path for folder in others)]
        largest = 0
        for stage in stages:
            if stage.__name__ not in work.journal.finished:
                stage(job)
                work.journal.finished.append(stage.__name__)
                processes.from_first(work.save)
                work.journal = processes.from_first(lambda: work.journal)
            there = processes.from_first(lambda: sum(map(folder_bytes, folders)))
            largest = max(largest, there)
        processes.from_first(work.publish)
    return largest


def in_first(stage: Callable[[AnyJob], None]) -> Callable[[AnyJob], None]:
    """A stage that the first process does alone, while the others wait."""

    @wraps(stage)
    def run(job: AnyJob) -> None:
        job.processes.from_first(stage, job)

    return run
