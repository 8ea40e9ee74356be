"""Tensors of a checkpoint as Transformers' model holds them, where that differs from how they are stored.

Experts lie on the disk one by one, and in a model one above the other. What becomes what is Transformers' own table,
by which it loads and saves; here it is followed one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from typing_extensions import override

from ..errors import SourceError, first_line
from .reader import TensorReader


class ModelReader(TensorReader):
    """The tensors of another reader by the names of a model, merged when they are asked for; see `as_held`."""

    def __init__(self, stored: TensorReader, model: PreTrainedModel, transforms: list) -> None:
        self._stored, self._model = stored, model
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._parts: dict[str, list[tuple[str, str | None]]] = {}
        held = model.state_dict().keys()
        # The order in which Transformers loads them is that of the experts.
        for name in sorted(stored.names, key=dot_natural_key):
            target, pattern = (name, None) if name in held else rename_source_key(name, renamings, converters)
            self._parts.setdefault(target, []).append((name, pattern))

    @property
    @override
    def names(self) -> list[str]:
        return sorted(self._parts)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._without_values(name).shape)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._without_values(name).dtype

    @override
    def tensor(self, name: str) -> Tensor:
        return self._held(name, self._stored.tensor)

    @override
    def rows(self, name: str, indices: Tensor) -> Tensor:
        parts = self._parts[name]
        return super().rows(name, indices) if parts[0][1] else self._stored.rows(parts[-1][0], indices)

    @override
    def pieces(self, name: str) -> Iterator[Tensor]:
        parts = self._parts[name]
        return super().pieces(name) if parts[0][1] else self._stored.pieces(parts[-1][0])

    def _without_values(self, name: str) -> Tensor:
        stored = self._stored
        return self._held(name, lambda part: torch.empty(stored.shape(part), dtype=stored.dtype(part), device="meta"))

    def _held(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        parts = self._parts[name]
        pattern = parts[0][1]
        if pattern is None:
            return read(parts[-1][0])
        converter = deepcopy(self._converters[pattern])
        for part, its_pattern in parts:
            converter.add_tensor(name, part, its_pattern, read(part))
        try:
            (held,) = converter.convert(name, model=self._model, config=self._model.config).values()
        except Exception as error:
            # Transformers' operations, on whatever the checkpoint has.
            raise SourceError(
                f"the tensors of {name}, {parts[0][0]} and {len(parts) - 1} more, do not make one "
                f"({first_line(error)}); fetch the model again."
            ) from error
        return held[0] if isinstance(held, list) else held


class ModelTensors(TensorReader):
    """The tensors of a model itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = model.state_dict()

    @property
    @override
    def names(self) -> list[str]:
        return sorted(self._tensors)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    @override
    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def as_held(stored: TensorReader, model: PreTrainedModel) -> TensorReader:
    """The tensors of ``stored`` by the names and in the shapes that they have in ``model``.

    Args:
        stored: gives the tensors as they lie on the disk.
        model: on any device, the meta device for one.

    Returns:
        A reader that reads and merges a tensor when it is asked for; ``stored`` itself where there is no difference.
    """
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return ModelReader(stored, model, transforms) if transforms else stored
