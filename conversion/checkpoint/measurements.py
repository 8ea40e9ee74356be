"""What the pass over the calibration text leaves of every layer: statistics, and hidden states for the second pass.

A conversion keeps them in its work folder, each until its layer is converted. In a folder of the user's they stay, so
that other budgets of the same method, source and text need no calibration of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import JournalError, OutputError
from .atomic import write_tensors, write_text

_JOURNAL = "measurements.json"


class Measurements(ABC):
    """Files of ``folder``, each complete or absent; ``measured`` counts the layers that have statistics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def measured(self) -> int:
        """Layers whose statistics, and whose successor's hidden states, are written."""

    @abstractmethod
    def advance(self, measured: int) -> None:
        """Records that ``measured`` layers are: call it when their files are written."""

    @abstractmethod
    def forget(self, layer: int) -> None:
        """The conversion that is running needs nothing more of ``layer``."""

    def write_statistics(self, layer: int, tensors: dict[str, Tensor]) -> None:
        write_tensors(self._statistics(layer), tensors)

    def read_statistics(self, layer: int) -> dict[str, Tensor]:
        return self._load(self._statistics(layer))

    def write_hidden_states(self, layer: int, hidden_states: Tensor) -> None:
        """Hidden states of the calibration text that enter ``layer``."""
        write_tensors(self._hidden_states(layer), {"hidden_states": hidden_states})

    def read_hidden_states(self, layer: int) -> Tensor:
        return self._load(self._hidden_states(layer))["hidden_states"]

    def delete(self, layer: int) -> None:
        self._statistics(layer).unlink(missing_ok=True)
        self._hidden_states(layer).unlink(missing_ok=True)

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise JournalError(
                f"{path} is missing or damaged, though the journal names it; delete {self.folder}."
            ) from error

    def _statistics(self, layer: int) -> Path:
        return self.folder / f"statistics-{layer:05d}.safetensors"

    def _hidden_states(self, layer: int) -> Path:
        return self.folder / f"hidden-states-{layer:05d}.safetensors"


class _Journal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    identity: dict[str, str]
    measured: NonNegativeInt = 0


class SharedMeasurements(Measurements):
    """Measurements that outlive a conversion; use it as a context manager, which locks the folder.

    Args:
        folder: made where it is absent; one that was left unfinished is gone on with.
        identity: source, method, text and seed; what was measured on others is refused.

    Raises:
        JournalError: another process is using it, its journal is damaged, or it belongs to something else.
        OutputError: it cannot be made.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        super().__init__(folder)
        self._journal = _Journal(identity=identity)
        self._lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)

    def __enter__(self) -> SharedMeasurements:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise JournalError(f"another process is using the statistics in {self.folder}; wait for it.") from error
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written ({error.strerror}); choose another folder.") from error
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _open(self) -> None:
        file = self.folder / _JOURNAL
        if not file.is_file():
            if any(found.suffix != ".tmp" for found in self.folder.iterdir()):
                raise JournalError(f"{self.folder} has files but no statistics; choose an empty or a new folder.")
            self.advance(0)
            return
        try:
            found = _Journal.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise JournalError(f"the journal {file} is damaged; delete {self.folder} to start over.") from error
        for name, value in self._journal.identity.items():
            if found.identity.get(name) != value:
                raise JournalError(
                    f"the statistics in {self.folder} are of {name} {found.identity.get(name)}, not {value}; choose "
                    "another folder for these."
                )
        self._journal = found

    @property
    def measured(self) -> int:
        return self._journal.measured

    def advance(self, measured: int) -> None:
        self._journal.measured = measured
        write_text(self.folder / _JOURNAL, self._journal.model_dump_json(indent=2) + "\n")

    def forget(self, layer: int) -> None:
        """Nothing: the next conversion needs it."""
