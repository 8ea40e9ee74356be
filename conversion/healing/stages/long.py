"""``long``: the same as ``logits``, over windows of thousands of tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .logits import Logits


class Long(Logits):
    """A short phase at the end, by which attention learns to find what is far away."""

    stage: Literal["long"] = "long"  # type: ignore[assignment]
    share: float = Field(default=0.1, gt=0)
    window: int = Field(default=4096, ge=2)
    batch: int = Field(default=1, ge=1)
