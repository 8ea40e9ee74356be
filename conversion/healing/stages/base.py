"""What a stage of a healing is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..pair import Pair


class Stage(BaseModel, ABC):
    """A part of a healing, by its settings.

    Args:
        stage: its name.
        share: of the healing's time or steps, in proportion to the other stages'. What a stage leaves goes to those
            behind it.
        window: tokens in a window.
        batch: windows in a step; of one window alone the gradient is so noisy that the rate must be lower.
        rate: what the learning rates are multiplied by.

    Attributes:
        ends_early: its own loss is measured on held-out text, and `is_done` asked.
    """

    ends_early: ClassVar[bool] = False

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    share: float = Field(gt=0)
    window: int = Field(default=512, ge=2)
    batch: int = Field(default=4, ge=1)
    rate: float = Field(default=1.0, gt=0)

    @abstractmethod
    def losses(self, pair: Pair, ids: Tensor, each: Callable[[Tensor], None]) -> None:
        """Computes what is minimised on windows ``ids [B, S]``, a mean over tokens.

        It may be a sum of terms with nothing in common that learns. Every term goes to ``each`` as soon as it is
        there, so that what it was computed from need not be kept for the others.
        """

    def is_done(self, held_out: Sequence[float]) -> bool:
        """Whether nothing more is to be gained, by the losses on held-out text so far; the newest is the last."""
        return False
