"""The work folder of a conversion: what is done, so that a killed run goes on where it stopped.

Every file in it is complete or absent. Statistics and hidden states are kept until their layer is converted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError
from typing_extensions import override

from ...errors import JournalError
from ...evaluation.verify import Verification
from ...forward.hidden_states import HiddenStates
from ...layers import MLAWeights
from .layer_store import read_layer, write_layer
from .measurements import Measurements
from .partial_output import PartialOutput, StagedJournal


class ConversionJournal(StagedJournal):
    """What the stages of a conversion have found, and how far the unfinished one is.

    ``measured`` and ``converted`` count layers; ``sensitivity`` is the model's to each layer; ``budgets`` are the final
    `LayerBudget` by layer, as a tuple; ``errors`` the relative output error of each
    converted layer, ``shards`` the finished files of the checkpoint.
    """

    measured: NonNegativeInt = 0
    sensitivity: list[float] = []
    budgets: list[tuple[int, int, int, int, bool]] = []
    converted: NonNegativeInt = 0
    errors: list[float | None] = []
    shards: list[str] = []
    verification: Verification | None = None


class WorkFolder(PartialOutput[ConversionJournal]):
    """The `PartialOutput` of a conversion, with its measurements and the converted layers.

    Args:
        output: the new checkpoint's folder.
        identity: see `Journal`.
        device: see `HiddenStates`.
    """

    what = "conversion"

    def __init__(self, output: Path, identity: dict[str, str], device: torch.device) -> None:
        super().__init__(output, ConversionJournal(identity=identity))
        self.converted_states = HiddenStates(self.path / "converted", device)
        self.contexts = HiddenStates(self.path / "contexts", device)

    @override
    def begin(self) -> None:
        for states in (self.converted_states, self.contexts):
            states.folder.mkdir()

    @property
    def measurements(self) -> Measurements:
        """The conversion's own statistics and hidden states."""
        return _OwnMeasurements(self)

    def write_layer(self, layer: int, weights: MLAWeights) -> None:
        """Keeps the converted attention of ``layer``."""
        write_layer(self._layer(layer), weights)

    def read_layer(self, layer: int) -> MLAWeights:
        """What `write_layer` kept. Raises `JournalError` where the file is missing or damaged."""
        try:
            return read_layer(self._layer(layer))
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise self._lost(self._layer(layer)) from error

    def _lost(self, path: Path) -> JournalError:
        return JournalError(f"{path} is missing or damaged, though the journal names it; delete {self.path}.")

    def _layer(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"


class _OwnMeasurements(Measurements):
    """Kept in the work folder, each until its layer is converted."""

    def __init__(self, work: WorkFolder) -> None:
        super().__init__(work.path, work.converted_states.device)
        self._work = work

    @property
    @override
    def measured(self) -> int:
        return self._work.journal.measured

    @override
    def advance(self, measured: int) -> None:
        self._work.journal.measured = measured
        self._work.save()

    @override
    def forget(self, layer: int) -> None:
        """Deletes what was measured of ``layer``; the journal has moved on."""
        self.delete(layer)
