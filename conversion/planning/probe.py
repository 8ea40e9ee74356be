"""How fast this machine is at what a conversion does: measured each time, for no table knows the machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..checkpoint.paths import inside
from ..errors import SourceError
from ..forward.products import fast_float32

_SIDE = 1024
"""Of the matrices that are multiplied."""
_SOLVED = 384
"""Of the matrix whose eigenvalues are sought, on which the factorisations rest."""
_READ = 2**26
"""Bytes of the weights that are read."""
_RUNS = 3


@dataclass(frozen=True)
class Speed:
    """What was measured.

    ``products`` are operations a second of a float32 product. ``solving`` are the seconds of the eigenvalues of a
    symmetric float64 matrix ``[n, n]``, divided by ``n^3``. ``reading`` are bytes a second of the weights' files, None
    where there are none yet.
    """

    products: float
    solving: float
    reading: float | None


@fast_float32()
def measure_speed(device: torch.device, folder: Path) -> Speed:
    """Takes a second or less.

    Args:
        device: where products are computed; factorisations are timed on the CPU.
        folder: of the source, whose largest file is read from.
    """
    products, solving = _arithmetic(device)
    return Speed(products, solving, _reading(folder))


@cache
def _arithmetic(device: torch.device) -> tuple[float, float]:
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    symmetric = torch.eye(_SOLVED, dtype=torch.float64, device="cpu") + 1

    def multiply() -> None:
        # Fetching a value waits for the device.
        float((matrix @ matrix)[0, 0])

    return 2 * _SIDE**3 / _seconds(multiply), _seconds(lambda: torch.linalg.eigh(symmetric)) / _SOLVED**3


def _seconds(run: Callable[[], object]) -> float:
    """The best of a few runs behind one that warms up."""
    taken = []
    for _ in range(1 + _RUNS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _reading(folder: Path) -> float | None:
    largest = max(_weights(folder), key=lambda file: file.stat().st_size, default=None)
    if largest is None:
        return None
    start = time.perf_counter()
    with open(largest, "rb", buffering=0) as file:
        size = len(file.read(_READ))
    return size / (time.perf_counter() - start) if size else None


def _weights(folder: Path) -> Iterator[Path]:
    for pattern in ("*.safetensors", "*.gguf"):
        for file in folder.glob(pattern):
            # A link out of the folder is refused where weights are read for their values.
            with suppress(SourceError):
                if inside(folder, file.name).is_file():
                    yield file
