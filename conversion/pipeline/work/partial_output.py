"""The folder in which an output is made, so that a killed run goes on where it stopped.

It lies beside the output NAME as ``.NAME.partial``. What becomes the output is its folder ``checkpoint``; the journal
beside that is rewritten after the files that it speaks of.
"""

from __future__ import annotations

import os
import shutil
from abc import abstractmethod
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from filelock import Timeout
from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from ...checkpoint.atomic import write_text
from ...errors import ConversionError, JournalError, OutputError
from .locked_folder import LockedFolder, first_difference, folder_lock

_JOURNAL = "journal.json"
_CHECKPOINT = "checkpoint"


class Journal(BaseModel):
    """``identity`` describes what is made (source, recipe, versions): something else must not go on from here."""

    model_config = ConfigDict(extra="forbid")

    identity: dict[str, str]


class StagedJournal(Journal):
    """The journal of what is made in stages: the names of those that are ``finished``, in their order."""

    finished: list[str] = []


AnyJournal = TypeVar("AnyJournal", bound=Journal)


class PartialOutput(LockedFolder, Generic[AnyJournal]):
    """The folder, as a context manager that locks it.

    A refusal within the context deletes the folder, for the same run would be refused again.

    Args:
        output: where the result will lie.
        journal: of a run that has done nothing yet.

    Raises:
        JournalError: another process is using it, its journal is damaged, or it belongs to something else.
        OutputError: it cannot be made.
    """

    what: ClassVar[str]
    """The kind of output, for messages."""

    def __init__(self, output: Path, journal: AnyJournal) -> None:
        super().__init__(beside(output), "output folder")
        self.output, self.checkpoint = output, self.path / _CHECKPOINT
        self.journal = journal
        self._nothing_done = journal.model_copy(deep=True)

    def __exit__(self, *exception: object) -> None:
        error = exception[1] if exception else None
        refused = isinstance(error, ConversionError) and not isinstance(error, OutputError | JournalError)
        if refused or (isinstance(error, Exception) and self.is_idle):
            shutil.rmtree(self.path, ignore_errors=True)
        super().__exit__()

    @override
    def open(self) -> None:
        file = self.path / _JOURNAL
        if not file.is_file():
            # The journal is the first file; a kill may leave it half-written under its temporary name.
            if any(found.suffix != ".tmp" for found in self.path.iterdir()):
                raise JournalError(f"{self.path} has files but no journal; delete the folder to start over.")
        else:
            found = self.read_journal(file, type(self.journal))
            # The last folder to be made, and the first to leave: without it a run had not begun, or has published.
            if self.checkpoint.exists():
                self._require_same(found.identity)
                self.journal = found
                return
            self._empty()
        try:
            self.save()
            self.begin()
            self.checkpoint.mkdir()
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    @property
    def is_idle(self) -> bool:
        """Whether nothing is done that a later run could go on from."""
        return self.journal == self._nothing_done

    @abstractmethod
    def begin(self) -> None:
        """Makes what the folder holds beside the journal and the checkpoint."""

    def save(self) -> None:
        """Writes the journal."""
        write_text(self.path / _JOURNAL, self.journal.model_dump_json(indent=2) + "\n")

    def publish(self) -> None:
        """Gives the finished checkpoint its final name, then deletes the folder."""
        try:
            self.checkpoint.rename(self.output)
        except OSError as error:
            raise OutputError(
                f"{self.output} cannot be written ({error.strerror}); move it away and run the same command again."
            ) from error
        # What cannot be deleted now is by the next run.
        shutil.rmtree(self.path, ignore_errors=True)

    def _require_same(self, identity: dict[str, str]) -> None:
        different = first_difference(self.journal.identity, identity)
        if different is not None:
            name, found, wanted = different
            raise JournalError(
                f"{self.path} holds an unfinished {self.what} with {name} {found}, not {wanted}; "
                "finish that one with its own settings, or delete the folder to start over."
            )

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def versions() -> dict[str, str]:
    """What computes, by its release: another one may give other bytes, and must not go on from here."""
    return {name: version(name) for name in ("modeling-mla", "torch", "transformers")}


def require_absent(output: Path) -> None:
    """Refuses an output that exists.

    Where a run was killed when it had published and not yet deleted its folder, this deletes it.

    Raises:
        OutputError: ``output`` exists.
    """
    if not os.path.lexists(output):
        return
    left = beside(output)
    if (left / _JOURNAL).is_file() and not (left / _CHECKPOINT).exists():
        with suppress(Timeout, OSError), folder_lock(left) as lock:
            shutil.rmtree(left, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
    raise OutputError(f"{output} exists already; choose another output, or move it away.")


def beside(output: Path) -> Path:
    """Where the folder lies in which ``output`` is made."""
    return output.with_name(f".{output.name}.partial")
