"""Tensors of a checkpoint by name, read only when asked for; those of safetensors files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from ..errors import SourceError, first_line
from .json_fields import FLOATS
from .paths import inside
from .safetensors_file import DTYPES, NAMES, SafetensorsFile
from .weight_files import weight_files

PIECE = 2**24
"""Values of a tensor that are in memory at a time where it is read from one end to the other."""


class TensorReader(ABC):
    """Lazy access to a checkpoint's tensors."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The tensor's type, without reading it. Raises `SourceError` for one that PyTorch has not."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU, in the shape that `shape` tells."""

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows ``indices [...]`` of the matrix ``name [R, C]``, ``[..., C]``: where few of a table are needed."""
        return self.tensor(name)[indices]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor's values in their order, flat, at most `PIECE` at a time."""
        yield from self.tensor(name).flatten().split(PIECE)

    def require_weights(self, name: str) -> None:
        """Raises `SourceError` where the tensor is of a type in which no weights are converted."""
        dtype = self.dtype(name)
        if dtype not in FLOATS.values():
            raise _unconvertible(name, NAMES.get(dtype, str(dtype)))


class SafetensorsReader(TensorReader):
    """A folder with ``model.safetensors``, or shards and their index. Looks at every shard, and reads no tensor yet.

    A tensor that several shards hold is that of the last one, as for Transformers.

    Args:
        explicit: see `weight_files`.

    Raises:
        SourceError: see `weight_files`; a shard is missing, truncated, or without a tensor that the index promises.
    """

    def __init__(self, folder: Path, explicit: str | None = None) -> None:
        self._shard_of: dict[str, SafetensorsFile] = {}
        found = weight_files(folder, explicit)
        for file in found.files:
            shard = _open_shard(inside(folder, file))
            self._shard_of |= dict.fromkeys(shard.names, shard)
        for name in found.promised:
            if name not in self._shard_of:
                raise SourceError(
                    f"tensor {name} is in {found.index} of {folder} but in no shard; fetch the model again."
                )

    @property
    @override
    def names(self) -> list[str]:
        return sorted(self._shard_of)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._shard_of[name].shape(name)

    @override
    def dtype(self, name: str) -> torch.dtype:
        stored = self._shard_of[name].stored_as(name)
        if stored not in DTYPES:
            raise _unconvertible(name, stored)
        return DTYPES[stored]

    @override
    def tensor(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self._shard_of[name].values(name, 0, math.prod(shape)).view(shape)

    @override
    def rows(self, name: str, indices: Tensor) -> Tensor:
        return self._shard_of[name].rows(name, indices.flatten()).unflatten(0, indices.shape)

    @override
    def pieces(self, name: str) -> Iterator[Tensor]:
        size = math.prod(self.shape(name))
        for first in range(0, size, PIECE):
            yield self._shard_of[name].values(name, first, min(PIECE, size - first))


def _unconvertible(name: str, stored_as: str) -> SourceError:
    known = ", ".join(FLOATS)
    return SourceError(f"tensor {name} is stored as {stored_as}, which cannot be converted; give it as {known}.")


def _open_shard(path: Path) -> SafetensorsFile:
    if not path.is_file():
        raise SourceError(f"shard {path.name} of {path.parent} is missing; fetch the model again.")
    try:
        return SafetensorsFile(path)
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"shard {path.name} of {path.parent} is truncated or damaged ({first_line(error)}); fetch the model again."
        ) from error
