"""What a user did that cannot work: one line each, with the value, the limit and the next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class ConversionError(Exception):
    """Bad input to a conversion; the message is a complete line for the user."""

    exit_code: ClassVar[int] = 2


class SourceError(ConversionError):
    """A source checkpoint that cannot be found, read, or converted."""


class BudgetError(ConversionError):
    """A cache budget that a method cannot meet, or ranks that do not fit."""


class CalibrationError(ConversionError):
    """A calibration text that cannot be read or is too short."""


class OutputError(ConversionError):
    """An output that exists already or cannot be written."""


class JournalError(ConversionError):
    """A work folder of an earlier run that is damaged, in use, or belongs to another conversion."""


class VerificationError(ConversionError):
    """A converted checkpoint that is not what it should be."""

    exit_code: ClassVar[int] = 3


@contextmanager
def blaming(kind: type[ConversionError], what: str) -> Iterator[None]:
    """Turns any failure within it into a ``kind`` that begins with ``what``: of code that runs what a user gave."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}.") from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message, and the next where it announces that; its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
