"""A checkpoint whose query maps are two matrices a layer, read as if they were one, for engines that know one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import override

from ..checkpoint.reader import TensorReader

_BEHIND, _FRONT = ".q_head_proj.weight", ".q_proj."


def without_head_maps(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same model with one query matrix a layer."""
    if config.q_head_dim is None:
        return config
    whole = copy.deepcopy(config)
    whole.q_head_dim = None
    return whole


class WholeQueries(TensorReader):
    """``q_proj`` is what ``q_head_proj`` makes of it, ``[H*(d_n+d_r), D]``, and its bias ``[H*(d_n+d_r)]``.

    Args:
        stored: the checkpoint; one without ``q_head_proj`` behind a plain ``q_proj`` is read as it is.
        config: of the checkpoint.
    """

    def __init__(self, stored: TensorReader, config: PreTrainedConfig) -> None:
        self._stored = stored
        self._has_maps = config.q_head_dim is not None

    @property
    @override
    def names(self) -> list[str]:
        return [name for name in self._stored.names if not (self._has_maps and name.endswith(_BEHIND))]

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        shape, behind = self._stored.shape(name), self._map_of(name)
        if behind is None:
            return shape
        heads, rows, _ = self._stored.shape(behind)
        return (heads * rows, *shape[1:])

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(name)

    @override
    def tensor(self, name: str) -> Tensor:
        tensor, behind = self._stored.tensor(name), self._map_of(name)
        if behind is None:
            return tensor
        maps = self._stored.tensor(behind).double()
        by_head = tensor.double().view(len(maps), maps.shape[2], -1)
        return (maps @ by_head).flatten(0, 1).view(self.shape(name)).to(tensor.dtype)

    def _map_of(self, name: str) -> str | None:
        if not self._has_maps or _FRONT not in name:
            return None
        return name.rpartition(_FRONT)[0] + _BEHIND
