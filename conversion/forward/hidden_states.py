"""Hidden states of a text on their way through a model, in files: what a later pass, or a resumed run, reads again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.atomic import write_tensors
from ..errors import JournalError

BLOCK = 8
"""Windows whose hidden states are in one file, and in memory at a time: a longer text has more files."""


class HiddenStates:
    """Hidden states of the calibration text in files of ``folder``, each complete or absent.

    Those that are read again lie on ``device``.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def write_block(self, layer: int, block: int, hidden_states: Tensor) -> None:
        """Keeps those of the windows ``block * BLOCK`` and on, ``[<= BLOCK, S, D]``, that enter ``layer``."""
        write_tensors(self._block(layer, block), {"hidden_states": hidden_states})

    def read_block(self, layer: int, block: int) -> Tensor:
        """What `write_block` kept. Raises `JournalError` where the file is missing or damaged."""
        return self._load(self._block(layer, block))["hidden_states"].to(self.device)

    def delete(self, layer: int) -> None:
        """Deletes all that is kept of ``layer``."""
        for path in self.folder.glob(f"{self._of_layer(layer)}*"):
            path.unlink(missing_ok=True)

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise JournalError(
                f"{path} is missing or damaged, though the journal names it; delete {self.folder}."
            ) from error

    def _block(self, layer: int, block: int) -> Path:
        return self.folder / f"{self._of_layer(layer)}{block:05d}.safetensors"

    @staticmethod
    def _of_layer(layer: int) -> str:
        return f"hidden-states-{layer:05d}-"
