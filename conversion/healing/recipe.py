"""What the user asked a healing for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..devices.choice import AUTO


@dataclass(frozen=True)
class HealingRecipe:
    """What the user asked for.

    Args:
        model: the converted checkpoint.
        teacher: the model that it was made from.
        data: as for `load_windows`.
        output: a new folder.
        minutes: of training and validation; or, for a run that can be repeated exactly,
        steps: of one window each.
        lora_rank: train adapters of this rank, merged at the end; None trains the matrices themselves.
        seed: of the order of the text and the adapters' start.
        device: as for a conversion.
    """

    model: str
    teacher: str
    data: str
    output: Path
    minutes: float | None = None
    steps: int | None = None
    lora_rank: int | None = None
    seed: int = 0
    device: str = AUTO
