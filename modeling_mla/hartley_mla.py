"""The fixed orthogonal matrix behind which a vector has no outlying channels."""

from __future__ import annotations

import functools
import math

import torch


@functools.cache
def hartley_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[size, size]`` orthogonal: signs, then a discrete Hartley transform (Bracewell, 1983).

    It exists for every size, where Hadamard's matrices do not, and all its entries are alike in size. The signs, drawn
    once for each size and on the CPU, keep it from gathering a wave over the channels in one of them.
    """
    places = torch.arange(size, device="cpu")
    angles = torch.outer(places, places).remainder(size).double() * (2 * math.pi / size)
    draw = torch.Generator("cpu").manual_seed(size)
    signs = 1 - 2 * torch.randint(0, 2, (size, 1), generator=draw, device="cpu")
    return (signs * (angles.cos() + angles.sin()) / math.sqrt(size)).to(device, dtype)
