"""The work folder of a healing: a state from which a stopped one goes on, the best weights, and what came of it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from ..checkpoint.atomic import replacing, write_tensors
from ..errors import JournalError
from ..pipeline.work.partial_output import PartialOutput, StagedJournal
from .validation import mean

_STATE = "state.pt"
_BEST = "best.safetensors"
_TEXT = "text.safetensors"
_HEALED = "healed.safetensors"


class Look(BaseModel):
    """One evaluation: ``kl`` by domain; ``loss`` of the stage on the text it learns from, lately, and ``held_out``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    step: int
    tokens: int
    seconds: float
    kl: dict[str, float]
    loss: float | None = None
    held_out: float | None = None


class Healed(BaseModel):
    """What came of a healing.

    ``before`` and ``after`` are ``KL(teacher || model)`` by domain, in nats a token, over windows that were not learnt
    from; ``after`` is that of the weights that were saved. ``improved`` says whether they are other ones than the
    input's. ``note`` says why a healing ended early, or changed nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: dict[str, float]
    after: dict[str, float]
    improved: bool
    steps: int
    tokens: int
    seconds: float
    trained_parameters: int
    note: str | None = None
    looks: list[Look] = []

    @property
    def kl_before(self) -> float:
        """The mean over the domains."""
        return mean(self.before)

    @property
    def kl_after(self) -> float:
        """The mean over the domains."""
        return mean(self.after)


class HealingProgress(StagedJournal):
    """How far a healing is: ``healed`` is there when the training is over."""

    healed: Healed | None = None


class HealingFolder(PartialOutput[HealingProgress]):
    """The `PartialOutput` of a healing. Every file in it is complete or absent.

    Args:
        output: the healed checkpoint's folder.
        identity: see `Journal`.
    """

    what = "healing"

    def __init__(self, output: Path, identity: dict[str, str]) -> None:
        super().__init__(output, HealingProgress(identity=identity))

    @override
    def begin(self) -> None:
        pass

    @property
    @override
    def is_idle(self) -> bool:
        return super().is_idle and not any((self.path / name).is_file() for name in (_STATE, _TEXT))

    def write_state(self, state: dict[str, Any]) -> None:
        """Keeps tensors and plain values from which training goes on."""
        with replacing(self.path / _STATE) as temporary:
            torch.save(state, temporary)

    def read_state(self, device: torch.device) -> dict[str, Any] | None:
        """What `write_state` kept last, on the device; None where it has not yet."""
        path = self.path / _STATE
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise self._lost(path) from error

    def write_best(self, tensors: dict[str, Tensor], look: Look) -> None:
        """Keeps the weights of the best evaluation so far, with that."""
        write_tensors(self.path / _BEST, tensors, {"look": look.model_dump_json()})

    def best_look(self) -> Look | None:
        """The evaluation of the weights that `write_best` kept; None where it has not yet."""
        path = self.path / _BEST
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return Look.model_validate_json(file.metadata()["look"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._lost(path) from error

    def read_best(self) -> dict[str, Tensor]:
        """The weights that `write_best` kept."""
        return self._load(_BEST)

    def read_text(self) -> Tensor:
        """What `write_text` kept."""
        return self._load(_TEXT)["windows"]

    def write_text(self, windows: Tensor) -> None:
        """Keeps text ``[N, S]`` that the teacher wrote, which takes long."""
        write_tensors(self.path / _TEXT, {"windows": windows})

    def finish_training(self, healed: Healed, changed: dict[str, Tensor]) -> None:
        """Keeps what was changed, by its name in the checkpoint."""
        write_tensors(self.path / _HEALED, changed)
        self.journal.healed = healed
        self.save()

    def changed(self) -> dict[str, Tensor]:
        """What `finish_training` kept."""
        return self._load(_HEALED)

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise self._lost(self.path / name) from error

    def _lost(self, path: Path) -> JournalError:
        return JournalError(f"{path} is missing or damaged, though the journal names it; delete {self.path}.")
