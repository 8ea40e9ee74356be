"""Sums over a text that stay on the device where their terms are made."""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import CPU, has_float64
from .processes import Processes


class RunningSums:
    """Sums by name, of terms of any floating type, in float64; constant memory in the number of terms.

    A device without float64 keeps a sum as two float32 numbers, the second what additions to the first have rounded
    off (the two-sum of Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B): its error is that
    of the terms, not of their number.

    Args:
        device: where the terms lie.
        shapes: of the sums, by name.
    """

    def __init__(self, device: torch.device, **shapes: tuple[int, ...]) -> None:
        self.dtype = torch.float64 if has_float64(device) else torch.float32
        self._totals = {name: torch.zeros(shape, dtype=self.dtype, device=device) for name, shape in shapes.items()}
        self._rounded_off = {} if has_float64(device) else {name: total.clone() for name, total in self._totals.items()}

    def add(self, name: str, term: Tensor) -> None:
        """Adds a term to the sum of that name, which has the same shape."""
        total = self._totals[name]
        if not self._rounded_off:
            total += term
            return
        grown = total + term
        of_term = grown - total
        self._rounded_off[name] += (total - (grown - of_term)) + (term - of_term)
        self._totals[name] = grown

    def add_up(self, processes: Processes) -> None:
        """Adds up the sums of all processes, which have the same names and shapes."""
        self._totals, self._rounded_off = processes.summed(self.tensors()), {}

    def tensors(self) -> dict[str, Tensor]:
        """The sums, float64: on their device, or on the CPU where that has no float64."""
        if not self._rounded_off:
            return dict(self._totals)
        return {
            name: total.to(CPU).double() + self._rounded_off[name].to(CPU).double()
            for name, total in self._totals.items()
        }
