"""Eigenvectors and singular vectors, found where that is fast; they lie where the matrix does.

Both begin with a reduction by reflections whose every step waits for the one before. A GPU gains on it only where a
step has much to do: below about a thousand rows its launches cost more than the arithmetic, and LAPACK on the CPU is
faster, most of all for the many small matrices of a rotary key. For singular values cuSOLVER iterates by Jacobi or QR,
slower than LAPACK's divide and conquer at the sizes of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import CPU

LARGE = 1024
"""Rows from which on a GPU decomposes a symmetric matrix."""


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., n]``, ascending, and eigenvectors of a symmetric or Hermitian ``matrix [..., n, n]``."""
    device = matrix.device if matrix.shape[-1] >= LARGE else CPU
    values, vectors = torch.linalg.eigh(matrix.to(device))
    return values.to(matrix.device), vectors.to(matrix.device)


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``matrix [m, n]``: ``left [m, k]``, singular values ``[k]``, descending, ``right [k, n]``; k = min(m, n)."""
    left, singular, right = torch.linalg.svd(matrix.to(CPU), full_matrices=False)
    return left.to(matrix.device), singular.to(matrix.device), right.to(matrix.device)
