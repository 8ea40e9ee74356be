"""How much text each stage of a conversion reads: what the plan counts and the stages take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sources import SourceModel

WINDOW = 1024
VERIFIED_WINDOWS = 6
"""Of held-out text, in the check before a checkpoint is published."""
REFIT_SHARE = 0.75
REFIT_WINDOWS = 96
"""So much of the calibration text is refitted on, and at most so many windows: more gains little, and costs as much as
the first."""
WEIGHED_WINDOWS = 2
WEIGHED_LENGTH = 256
"""Tokens at the start of each window on which layers are weighed. What so little text says is not to be trusted far
from the median layer."""


@dataclass(frozen=True)
class TextUse:
    """The calibration text: ``windows`` of ``window`` tokens, which statistics read ``passes`` times."""

    window: int
    windows: int
    passes: int

    @classmethod
    def of(cls, source: SourceModel, tokens: int, *, twice: bool) -> TextUse:
        """Of so many tokens: at least one window, or none where there are none."""
        window = window_length(source)
        return cls(window, max(1, tokens // window) if tokens else 0, 1 + twice)

    @property
    def refitted(self) -> int:
        """Windows that a refit uses."""
        return len(refitted_windows(self.windows))


def window_length(source: SourceModel) -> int:
    """Tokens in a window: fewer than `WINDOW` where the model's context is shorter."""
    return min(WINDOW, source.context)


def refitted_windows(count: int) -> Tensor:
    """Which of ``count`` calibration windows a refit uses: their indices ``[n]``, ascending."""
    return spread_windows(count, min(REFIT_WINDOWS, math.ceil(REFIT_SHARE * count)))


def weighed_windows(windows: Tensor) -> Tensor:
    """The part of the calibration windows ``[N, S]`` on which layers are weighed."""
    return windows[spread_windows(len(windows), WEIGHED_WINDOWS), :WEIGHED_LENGTH]


def spread_windows(count: int, at_most: int) -> Tensor:
    """Indices ``[n]`` of at most ``at_most`` of ``count`` windows, evenly spread."""
    return torch.linspace(0, count - 1, min(count, at_most), device="cpu").round().long()
