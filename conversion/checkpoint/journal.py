"""The work folder of a conversion: what is done, so that a killed run goes on where it stopped.

It lies beside the output as ``.NAME.partial``. Every file in it is complete or absent; the journal is rewritten after
the files that it speaks of. Statistics and hidden states are kept until their layer is converted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError

from ..errors import JournalError
from ..layers import LayerBudget, MLAWeights
from .atomic import write_text
from .layer_store import read_layer, write_layer
from .locked_folder import LockedFolder, first_difference
from .measurements import HiddenStates, Measurements

_JOURNAL = "journal.json"


class Progress(BaseModel):
    """How far a conversion is.

    ``identity`` describes the conversion (source, recipe, versions): another one must not go on from here.
    ``measured`` and ``converted`` count layers; ``budgets`` are the final (kv_lora_rank, qk_rope_head_dim) by layer;
    ``errors`` the relative output error of each converted layer, ``shards`` the finished files of the checkpoint.
    """

    model_config = ConfigDict(extra="forbid")

    identity: dict[str, str]
    measured: NonNegativeInt = 0
    budgets: list[tuple[int, int]] | None = None
    converted: NonNegativeInt = 0
    errors: list[float | None] = []
    shards: list[str] = []


class WorkFolder(LockedFolder):
    """The work folder of the conversion to ``output``; use it as a context manager, which locks it.

    Raises:
        JournalError: another process is using it, its journal is damaged, or it belongs to another conversion.
        OutputError: it cannot be made.
    """

    def __init__(self, output: Path, identity: dict[str, str]) -> None:
        super().__init__(self.beside(output), "output folder")
        self.checkpoint = self.path / "checkpoint"
        self.converted_states = HiddenStates(self.path / "converted")
        self.contexts = HiddenStates(self.path / "contexts")
        self._identity = identity
        self.progress = Progress(identity=identity)

    @staticmethod
    def beside(output: Path) -> Path:
        """Where the work folder of ``output`` lies."""
        return output.with_name(f".{output.name}.partial")

    def open(self) -> None:
        """See `LockedFolder.open`."""
        journal = self.path / _JOURNAL
        if not journal.is_file():
            # The journal is the first file; a kill may leave it half-written under its temporary name.
            if any(file.suffix != ".tmp" for file in self.path.iterdir()):
                raise JournalError(f"{self.path} has files but no journal; delete the folder to start over.")
            self.save()
            self._make_folders()
            return
        try:
            progress = Progress.model_validate_json(journal.read_bytes())
        except ValidationError as error:
            raise JournalError(f"the journal {journal} is damaged; delete {self.path} to start over.") from error
        different = first_difference(self._identity, progress.identity)
        if different is not None:
            name, found, wanted = different
            raise JournalError(
                f"{self.path} holds an unfinished conversion with {name} {found}, not {wanted}; "
                "finish that one with its own settings, or delete the folder to start over."
            )
        self.progress = progress
        self._make_folders()

    def _make_folders(self) -> None:
        for folder in (self.checkpoint, self.converted_states.folder, self.contexts.folder):
            folder.mkdir(exist_ok=True)

    def save(self) -> None:
        """Writes the journal."""
        write_text(self.path / _JOURNAL, self.progress.model_dump_json(indent=2) + "\n")

    @property
    def measurements(self) -> Measurements:
        """The conversion's own statistics and hidden states."""
        return _OwnMeasurements(self)

    def write_layer(self, layer: int, weights: MLAWeights) -> None:
        write_layer(self._layer(layer), weights)

    def read_layer(self, layer: int) -> MLAWeights:
        try:
            return read_layer(self._layer(layer))
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise self._lost(self._layer(layer)) from error

    @property
    def budgets(self) -> list[LayerBudget] | None:
        stored = self.progress.budgets
        return None if stored is None else [LayerBudget(rank, rotary) for rank, rotary in stored]

    def publish(self, output: Path) -> None:
        """Gives the finished checkpoint its final name, then deletes the work folder."""
        self.checkpoint.rename(output)
        shutil.rmtree(self.path)

    def _lost(self, path: Path) -> JournalError:
        return JournalError(f"{path} is missing or damaged, though the journal names it; delete {self.path}.")

    def _layer(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"


class _OwnMeasurements(Measurements):
    """Kept in the work folder, each until its layer is converted."""

    def __init__(self, work: WorkFolder) -> None:
        super().__init__(work.path)
        self._work = work

    @property
    def measured(self) -> int:
        return self._work.progress.measured

    def advance(self, measured: int) -> None:
        self._work.progress.measured = measured
        self._work.save()

    def forget(self, layer: int) -> None:
        """Deletes them; the journal has moved on."""
        self.delete(layer)
