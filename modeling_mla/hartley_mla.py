"""The fixed orthogonal matrix behind which a vector has no outlying channels."""

from __future__ import annotations

import functools
import math

import torch


@functools.cache
def hartley_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[size, size]`` orthogonal: signs, then a discrete Hartley transform (Bracewell, 1983).

    It exists for every size, where Hadamard's matrices do not, and all its entries are alike in size. The signs, drawn
    once for each size, keep it from gathering a wave over the channels in one of them.
    """
    # On the CPU whatever the default device is: another would draw other signs.
    cpu = torch.device("cpu")
    index = torch.arange(size, device=cpu)
    angles = torch.outer(index, index).remainder(size).double() * (2 * math.pi / size)
    signs = 1 - 2 * torch.randint(0, 2, (size, 1), generator=torch.Generator(cpu).manual_seed(size), device=cpu)
    return (signs * (angles.cos() + angles.sin()) / math.sqrt(size)).to(device, dtype)
