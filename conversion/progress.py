"""How far a long step is, and what it took: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .terminal import console

_SECONDS_BETWEEN_LINES = 10.0


def shown_progress() -> Progress:
    """Bars on stderr, where that is a terminal. Use it as a context manager."""
    terminal = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    remaining = (TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *remaining, console=terminal, disable=not terminal.is_terminal)


def progress_for(*, quiet: bool) -> Progress:
    """`shown_progress`, or one that shows nothing."""
    return silent_progress() if quiet else shown_progress()


def silent_progress() -> Progress:
    """A progress that shows nothing."""
    return Progress(console=Console(quiet=True), disable=True)


@contextmanager
def counting(progress: Progress, description: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Shows a step of ``total`` parts, ``done`` of which an earlier run did.

    The function that it gives adds one part, or as many as it is told.
    """
    task = progress.add_task(description, total=total, completed=done)
    started = last = time.monotonic()
    completed = done

    def advance(parts: int = 1) -> None:
        nonlocal completed, last
        completed += parts
        progress.advance(task, parts)
        now = time.monotonic()
        if progress.disable and now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) / (completed - done) * (total - completed)
            progress.console.print(f"{description} {completed}/{total}, {left:.0f} s left")

    yield advance
    progress.stop_task(task)
    progress.refresh()


def durations(progress: Progress) -> dict[str, float]:
    """Seconds of every step that `counting` has shown, in their order; those of a step that came again are added."""
    found: dict[str, float] = {}
    for task in progress.tasks:
        found[task.description] = found.get(task.description, 0.0) + (task.elapsed or 0.0)
    return found


def told(seconds: dict[str, float]) -> str:
    """What `durations` found, for one line."""
    return ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items())


def peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
