"""What families have in common whose kinds of layers rotate by parameters of their own (Gemma 3, OLMo 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from .base import SourceModel


class RotaryByLayerType(SourceModel):
    """``rope_parameters`` holds a dictionary for each of ``layer_types``, and the rotary module a table."""

    rope_types = ("default", "linear", "llama3", "yarn")

    @property
    @override
    def rope_parameters(self) -> list[dict[str, Any]]:
        return [self.config.rope_parameters[kind] for kind in sorted(set(self.config.layer_types))]

    @override
    def layer_rotary(self, layer: int) -> tuple[Tensor, float]:
        kind = self.config.layer_types[layer]
        return getattr(self.rotary, f"{kind}_inv_freq"), getattr(self.rotary, f"{kind}_attention_scaling")

    @override
    def layer_angles(self, layer: int, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(hidden_states, position_ids, self.config.layer_types[layer])
