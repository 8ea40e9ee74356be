"""The work folder of a healing: the Trainer's states, and what came of them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from ..checkpoint.atomic import write_tensors
from ..errors import JournalError
from ..pipeline.work.partial_output import Journal, PartialOutput

_TRAINED = "trained.safetensors"


class Healed(BaseModel):
    """What came of a training.

    ``kl_before`` and ``kl_after`` are KL(teacher || model) in nats a token, mean over the validation windows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kl_before: float
    kl_after: float
    steps: int
    trained_parameters: int

    @property
    def improved(self) -> bool:
        """Whether the model came closer to its teacher."""
        return self.kl_after < self.kl_before


class HealingProgress(Journal):
    """How far a healing is: ``healed`` is there when the training is over."""

    healed: Healed | None = None


class HealingFolder(PartialOutput[HealingProgress]):
    """The `PartialOutput` of a healing, with the Trainer's states in its folder ``training``.

    Args:
        output: the healed checkpoint's folder.
        identity: see `Journal`.
    """

    what = "healing"

    def __init__(self, output: Path, identity: dict[str, str]) -> None:
        super().__init__(output, HealingProgress(identity=identity))
        self.training = self.path / "training"

    @override
    def begin(self) -> None:
        self.training.mkdir()

    @property
    @override
    def is_idle(self) -> bool:
        return super().is_idle and not any(self.training.iterdir())

    def finish_training(self, healed: Healed, trained: dict[str, Tensor]) -> None:
        """Keeps what was trained, by its name in the checkpoint."""
        write_tensors(self.path / _TRAINED, trained)
        self.journal.healed = healed
        self.save()

    def trained(self) -> dict[str, Tensor]:
        """What `finish_training` kept."""
        path = self.path / _TRAINED
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise JournalError(
                f"{path} is missing or damaged, though the journal names it; delete {self.path}."
            ) from error
