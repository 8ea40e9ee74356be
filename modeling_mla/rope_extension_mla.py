"""A longer context by configuration: ``rope_parameters`` set to a scaling after a model's frequencies were stored.

A converted model lists its frequencies, for they need not be those of any formula. Where its configuration also says
what they come from (``rope_inv_freq_source``), a scaling that is put there later acts on them as it would have acted
on the source, or is refused by name. It is never ignored.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from .transformers_seams_mla import ROPE_INIT_FUNCTIONS

BY_FREQUENCY = ("linear", "llama3", "yarn")
"""Scalings that act on every frequency by itself and do not change with the length of the text."""


class RopeExtension(NamedTuple):
    """What a scaling does to stored frequencies.

    ``log_ratios [d/2]`` are the logarithms of scaled over unscaled frequency on the source's own grid, which descends
    geometrically from 1 by ``theta ** (-2 / d)``; ``attention_factor`` multiplies queries and keys of every channel.
    """

    log_ratios: torch.Tensor
    theta: float
    attention_factor: float

    def apply(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Scaled ``inv_freq``, of any shape; zeros stay zero.

        A frequency between two of the source's (a folded one) takes the geometric mean of their ratios, weighted by its
        place between them.
        """
        size = len(self.log_ratios)
        place = -inv_freq.clamp(min=torch.finfo(torch.float32).tiny).double().log() * size / math.log(self.theta)
        place = place.clamp(0, size - 1)
        lower = place.floor().long().clamp(max=max(size - 2, 0))
        upper = (lower + 1).clamp(max=size - 1)
        ratio = torch.lerp(self.log_ratios[lower], self.log_ratios[upper], place - lower).exp()
        return (inv_freq.double() * ratio).to(inv_freq.dtype)


def rope_extension(config: PreTrainedConfig) -> RopeExtension | None:
    """The scaling that ``config.rope_parameters`` asks of stored frequencies; None where it is what they come from.

    Raises:
        ValueError: it cannot be applied to them, with the reason.
    """
    source, wanted = config.rope_inv_freq_source, _without_none(config.rope_parameters)
    if config.rope_inv_freq is None or source is None:
        return None
    stored = _without_none(source["rope_parameters"])
    if wanted == stored:
        return None
    reason = _why_not_applicable(stored, wanted)
    if reason is not None:
        raise ValueError(
            f"rope_parameters is {wanted}, but this checkpoint stores its rotary frequencies, made with {stored}, and "
            f"{reason}. Convert the source again with the rope_parameters that you want."
        )
    grid = copy.copy(config)
    grid.head_dim = source["head_dim"]
    scaled, factor = ROPE_INIT_FUNCTIONS[wanted["rope_type"]](grid)
    theta, size = float(stored["rope_theta"]), len(scaled)
    unscaled = -torch.arange(size, dtype=torch.float64) * math.log(theta) / size
    return RopeExtension(scaled.double().log() - unscaled, theta, float(factor))


def _why_not_applicable(stored: dict, wanted: dict) -> str | None:
    if "rope_type" not in stored:
        return "its kinds of layers rotate by parameters of their own"
    if stored["rope_type"] != "default":
        return f"they are scaled by {stored['rope_type']!r} already"
    if wanted.get("rope_theta") != stored["rope_theta"]:
        return f"another rope_theta than {stored['rope_theta']} would be another model"
    if wanted["rope_type"] not in BY_FREQUENCY:
        return f"{wanted['rope_type']!r} is none of {', '.join(BY_FREQUENCY)}, which act on each frequency alone"
    if stored.get("partial_rotary_factor", 1.0) != 1.0:
        return "the source rotates only a part of its channels, which cannot be told from the others here"
    return None


def _without_none(parameters: dict) -> dict:
    return {name: value for name, value in parameters.items() if value is not None}
