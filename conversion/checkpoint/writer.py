"""Writes a checkpoint as sharded safetensors, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from ..errors import VerificationError
from .atomic import write_json, write_tensors

MAX_SHARD_BYTES = 2 * 10**9


class ShardWriter:
    """A checkpoint whose tensors are known by shape and type before any of them exists.

    Args:
        folder: where the shards go.
        layout: every tensor by name, on the meta device; their order is the order in the shards.
    """

    def __init__(self, folder: Path, layout: dict[str, Tensor]) -> None:
        self.folder = folder
        self.layout = layout
        self.split: StateDictSplit = split_torch_state_dict_into_shards(layout, max_shard_size=MAX_SHARD_BYTES)

    @property
    def files(self) -> list[str]:
        """The names of the shards, in the order of the layout."""
        return list(self.split.filename_to_tensors)

    def write(self, file: str, fetch: Callable[[str], Tensor]) -> None:
        """Writes one shard and reads it back.

        Raises:
            VerificationError: a tensor has not the shape or type of the layout, is not finite, or is read back
                differently.
        """
        tensors = {name: fetch(name) for name in self.split.filename_to_tensors[file]}
        for name, tensor in tensors.items():
            planned = self.layout[name]
            if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
                raise VerificationError(
                    f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not {tuple(planned.shape)} of {planned.dtype}."
                )
            if not torch.isfinite(tensor).all():
                raise VerificationError(f"{name} is not finite; nothing was published.")
        write_tensors(self.folder / file, tensors, metadata={"format": "pt"})
        with safe_open(self.folder / file, framework="pt") as saved:
            for name, tensor in tensors.items():
                if not torch.equal(saved.get_tensor(name), tensor):
                    raise VerificationError(f"{name} was not read back from {file} as it was written; check the disk.")

    def write_index(self) -> None:
        """Writes the index of a checkpoint with more than one shard."""
        if not self.split.is_sharded:
            return
        index = {"metadata": self.split.metadata, "weight_map": dict(sorted(self.split.tensor_to_filename.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
