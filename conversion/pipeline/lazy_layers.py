"""A sequence with one item a layer, each loaded when it is looked at: all layers are read with one in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class LazyLayers(Sequence[T]):
    """``load(layer)`` of ``length`` layers."""

    def __init__(self, length: int, load: Callable[[int], T]) -> None:
        self._length, self._load = length, load

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._load(layer) for layer in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._load(index)
