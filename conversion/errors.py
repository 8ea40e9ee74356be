"""What a user did that cannot work: one line each, with the value, the limit and the next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

LONGEST_MESSAGE = 299
_LONGEST_WORD = 60
_LONGEST_REASON = 150
_CUT = "..."


def one_line(text: str) -> str:
    """``text`` as one printable line of at most `LONGEST_MESSAGE` characters.

    Line ends and control characters, which a name may hold, are escaped. Where it is too long, the middle is left out:
    of its long words, which are names, and if need be of the whole.
    """
    line = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    if len(line) > LONGEST_MESSAGE:
        line = " ".join(_without_middle(word, _LONGEST_WORD) for word in line.split(" "))
    return _without_middle(line, LONGEST_MESSAGE)


def _without_middle(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    kept = longest - len(_CUT)
    return text[: kept // 2] + _CUT + text[len(text) - (kept - kept // 2) :]


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in short.

    That is its first line, and the next where the first is but a heading; of much text it is the first sentence.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if len(said) > _LONGEST_REASON:
        said = said.partition(". ")[0]
    return _without_middle(said, _LONGEST_REASON)


class ConversionError(Exception):
    """Bad input to a conversion; the message is a complete line for the user, see `one_line`."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


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


class EndedTogetherError(Exception):
    """What ends this process as well as the first one, which raises the cause itself and tells the user."""

    def __init__(self, cause: str, exit_code: int) -> None:
        super().__init__(cause)
        self.exit_code = exit_code


@contextmanager
def blaming(kind: type[ConversionError], what: str) -> Iterator[None]:
    """Turns any failure within it into a ``kind`` whose message begins with ``what``.

    It goes around code that runs what a user gave, and so may fail in any way.
    """
    try:
        yield
    except (ConversionError, EndedTogetherError):
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}.") from error
