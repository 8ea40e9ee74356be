"""A folder that one process at a time writes to, and goes on with where an earlier one stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from ...errors import JournalError, OutputError

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class LockedFolder(ABC):
    """The folder, as a context manager: it locks it, makes it where it is absent, and opens what it holds.

    Args:
        path: of the folder.
        kind: what it is to the user, who is told to choose another one where it cannot be made.

    Raises:
        JournalError: another process is using it; what else `open` raises.
        OutputError: it cannot be made.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self._kind = path, kind
        self._lock = folder_lock(path)

    @abstractmethod
    def open(self) -> None:
        """Reads the journal, or begins one. The folder is there, and locked."""

    def read_journal(self, file: Path, kind: type[AnyModel]) -> AnyModel:
        """A journal in the folder, as ``kind`` describes it.

        Raises:
            JournalError: it is damaged.
        """
        try:
            return kind.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise JournalError(f"the journal {file} is damaged; delete {self.path} to start over.") from error

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; choose another {self._kind}.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self.path.mkdir(exist_ok=True)
        except Timeout as error:
            raise JournalError(f"another process is using {self.path}; wait for it or stop it.") from error
        except OSError as error:
            self._lock.release()
            raise OutputError(
                f"{self.path.parent} cannot be written ({error.strerror}); choose another {self._kind}."
            ) from error
        try:
            self.open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def folder_lock(path: Path) -> FileLock:
    """The lock of the folder ``path``, a file beside it; who does not get it at once does not wait."""
    return FileLock(path.with_name(f".{path.name.removeprefix('.')}.lock"), timeout=0)


def first_difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, str | None, str] | None:
    """The first name of ``wanted`` under which ``found`` has another value: the name, that value, the wanted one."""
    for name, value in wanted.items():
        if found.get(name) != value:
            return name, found.get(name), value
    return None
