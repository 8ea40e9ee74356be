"""The stages of a healing, each one file: what it minimises, on what text, and when it ends.

In: a pair of models and windows of token ids. Out: a loss with its gradients. A new stage is one file with one class,
and one name in `AnyStage`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import Stage
from .layers import Layers
from .logits import Logits
from .long import Long

AnyStage = Annotated[Layers | Logits | Long, Field(discriminator="stage")]

DEFAULT_STAGES: tuple[Layers | Logits | Long, ...] = (Layers(), Logits(), Long())

__all__ = ["DEFAULT_STAGES", "AnyStage", "Layers", "Logits", "Long", "Stage"]
