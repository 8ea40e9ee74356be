"""Float32 matrix products at full speed on AMD processors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


@contextmanager
def fast_float32() -> Iterator[None]:
    """Within it oneDNN multiplies float32 matrices where MKL would take its slow path: 2.3 times as fast on Zen 5.

    PyTorch hands such products to oneDNN only where bfloat16 would be allowed too. Without AMX, which AMD does not
    have, oneDNN keeps to float32 all the same.
    """
    if not _is_amd():
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _is_amd() -> bool:
    description = Path("/proc/cpuinfo")
    return description.is_file() and "AuthenticAMD" in description.read_text(encoding="utf-8")
