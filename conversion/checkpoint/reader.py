"""Tensors of a checkpoint by name, read only when asked for; those of safetensors files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from ..errors import SourceError, first_line
from .json_fields import FLOATS
from .paths import inside
from .weight_files import weight_files

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        """The tensor's type, without reading it."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU."""


class SafetensorsReader(TensorReader):
    """A folder with ``model.safetensors``, or shards and their index. Opens every shard, maps none into memory yet.

    A tensor that several shards hold is that of the last one, as for Transformers.

    Args:
        explicit: see `weight_files`.

    Raises:
        SourceError: see `weight_files`; a shard is missing, truncated, or without a tensor that the index promises.
    """

    def __init__(self, folder: Path, explicit: str | None = None) -> None:
        self._shard_of: dict[str, str] = {}
        self._shards = {}
        found = weight_files(folder, explicit)
        for file in found.files:
            self._shards[file] = _open_shard(inside(folder, file))
            self._shard_of |= dict.fromkeys(self._shards[file].keys(), file)
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
        return tuple(self._slice(name).get_shape())

    @override
    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            known = ", ".join(FLOATS)
            raise SourceError(f"tensor {name} is stored as {stored}, which cannot be converted; give it as {known}.")
        return _DTYPES[stored]

    @override
    def tensor(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]].get_tensor(name)

    def _slice(self, name: str):
        return self._shards[self._shard_of[name]].get_slice(name)


def _open_shard(path: Path):
    if not path.is_file():
        raise SourceError(f"shard {path.name} of {path.parent} is missing; fetch the model again.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"shard {path.name} of {path.parent} is truncated or damaged ({first_line(error)}); fetch the model again."
        ) from error
