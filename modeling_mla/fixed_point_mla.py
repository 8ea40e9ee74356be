"""Products of floating-point rows with small integers, by a processor's own products of bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

DIGITS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 3}
"""Bytes that hold a value relative to its row's largest: 15 bits beside the 8 and 11 of 16-bit floats, 23 beside 24."""


class FixedPoint(NamedTuple):
    """Rows as ``steps * sum_i 256**(k - 1 - i) * digits[i]``.

    Args:
        digits: ``[k, m, n]`` int8, the most significant first.
        steps: ``[m]`` float32.
        sums: ``[m]`` float32, of every row.
    """

    digits: torch.Tensor
    steps: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, count: int) -> FixedPoint:
        """``rows [m, n]`` float32 in ``count`` digits; a row that is not finite gives no finite product."""
        bound = 127 << (8 * (count - 1))
        steps = rows.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny * bound) / bound
        numbers = (rows / steps.unsqueeze(-1)).round_()
        sums = numbers.sum(-1) * steps
        rest, digits = numbers.to(torch.int32), []
        for _ in range(count - 1):
            # Carried so that every digit, the most significant too, is between -128 and 127.
            carried = (rest + 128) >> 8
            digits.append(rest - (carried << 8))
            rest = carried
        return cls(torch.stack([rest, *reversed(digits)]).to(torch.int8), steps, sums)

    def products(self, columns: torch.Tensor) -> torch.Tensor:
        """``[m, n] x [n, T]`` int8 to ``[m, T]`` float32: exact but for the rounding of the rows and of the result."""
        count, m, _ = self.digits.shape
        parts = torch._int_mm(self.digits.flatten(0, 1), columns).view(count, m, -1)
        total = parts[0].float()
        for part in parts[1:]:
            total = total.mul_(256).add_(part)
        return total.mul_(self.steps.unsqueeze(-1))
