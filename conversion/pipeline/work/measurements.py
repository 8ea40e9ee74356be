"""What a pass over the calibration text leaves of every layer: statistics, and hidden states for a later pass.

A conversion keeps them in its work folder, each until its layer is converted. In a folder of the user's they stay, so
that other budgets of the same method, source and text need no calibration of their own. What a method measures on an
intermediate model lies in a folder of its own within either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor
from typing_extensions import override

from ...checkpoint.atomic import write_tensors, write_text
from ...devices.choice import solving_device
from ...errors import JournalError
from ...forward.hidden_states import HiddenStates
from .locked_folder import LockedFolder, first_difference

_JOURNAL = "measurements.json"


class Measurements(HiddenStates, ABC):
    """Hidden states and statistics of the layers, in files of one folder."""

    @property
    @abstractmethod
    def measured(self) -> int:
        """How many layers have their statistics, and their successor's hidden states, written."""

    @abstractmethod
    def advance(self, measured: int) -> None:
        """Records that ``measured`` layers have been measured: call it when their files are written."""

    @abstractmethod
    def forget(self, layer: int) -> None:
        """Takes notice that the running conversion needs nothing more of ``layer``."""

    @property
    def has_text(self) -> bool:
        """Whether the text that was measured on is kept."""
        return self._text.is_file()

    def write_text(self, windows: Tensor) -> None:
        """Keeps the text, token ids ``[N, S]``: one that the source wrote, which takes long."""
        write_tensors(self._text, {"windows": windows})

    def read_text(self) -> Tensor:
        """The text ``[N, S]`` that `write_text` kept. Raises `JournalError` where the file is missing or damaged."""
        return self._load(self._text)["windows"]

    def write_statistics(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Keeps the running sums of ``layer``, by name."""
        write_tensors(self._statistics(layer), tensors)

    def read_statistics(self, layer: int) -> dict[str, Tensor]:
        """What `write_statistics` kept, on the device that factorises.

        Raises:
            JournalError: the file is missing or damaged.
        """
        device = solving_device(self.device)
        return {name: sums.to(device) for name, sums in self._load(self._statistics(layer)).items()}

    @override
    def delete(self, layer: int) -> None:
        super().delete(layer)
        self._statistics(layer).unlink(missing_ok=True)

    @property
    def _text(self) -> Path:
        return self.folder / "text.safetensors"

    def _statistics(self, layer: int) -> Path:
        return self.folder / f"statistics-{layer:05d}.safetensors"


class _Journal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    identity: dict[str, str]
    measured: NonNegativeInt = 0


class SharedMeasurements(Measurements, LockedFolder):
    """Measurements that outlive a conversion; use it as a context manager, which locks the folder.

    Args:
        folder: made where it is absent; one that was left unfinished is gone on with.
        identity: source, method, text and seed; what was measured on others is refused.
        device: see `HiddenStates`. What another device has measured serves as well.

    Raises:
        JournalError: another process is using it, its journal is damaged, or it belongs to something else.
        OutputError: it cannot be made.
    """

    def __init__(self, folder: Path, identity: dict[str, str], device: torch.device) -> None:
        Measurements.__init__(self, folder, device)
        LockedFolder.__init__(self, folder, "folder for statistics")
        self._journal = _Journal(identity=identity)

    @override
    def open(self) -> None:
        file = self.folder / _JOURNAL
        if not file.is_file():
            if any(found.suffix != ".tmp" for found in self.folder.iterdir()):
                raise JournalError(f"{self.folder} has files but no statistics; choose an empty or a new folder.")
            self.advance(0)
            return
        found = self.read_journal(file, _Journal)
        different = first_difference(self._journal.identity, found.identity)
        if different is not None:
            name, other, wanted = different
            raise JournalError(
                f"the statistics in {self.folder} are of {name} {other}, not {wanted}; choose another folder for these."
            )
        self._journal = found

    @property
    @override
    def measured(self) -> int:
        return self._journal.measured

    @override
    def advance(self, measured: int) -> None:
        self._journal.measured = measured
        write_text(self.folder / _JOURNAL, self._journal.model_dump_json(indent=2) + "\n")

    @override
    def forget(self, layer: int) -> None:
        """Keeps the files of ``layer``: the next conversion needs them."""


class IntermediateMeasurements(SharedMeasurements):
    """Statistics of an intermediate model, in a folder of its own within that of the source's.

    Hidden states are kept for the next layer only.

    Args:
        source: the measurements that the intermediate model was made from. They belong to one source, method, text and
            seed already.
        qk_rope_head_dims: by layer; what else the intermediate model depends on.
    """

    def __init__(self, source: Measurements, qk_rope_head_dims: Sequence[int]) -> None:
        widths = [str(width) for width in qk_rope_head_dims]
        name = "-".join(("intermediate", *dict.fromkeys(widths)))
        super().__init__(source.folder / name, {"qk_rope_head_dims": " ".join(widths)}, source.device)

    @override
    def open(self) -> None:
        super().open()
        self._delete_used()

    @override
    def advance(self, measured: int) -> None:
        super().advance(measured)
        self._delete_used()

    def _delete_used(self) -> None:
        for layer in range(self.measured):
            HiddenStates.delete(self, layer)
