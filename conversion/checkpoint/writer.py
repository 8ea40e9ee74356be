"""Writes a checkpoint as sharded safetensors, a piece of a tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor

from ..errors import VerificationError
from .atomic import replacing, write_json
from .reader import SafetensorsReader
from .safetensors_file import checksum, file_order, write_tensors_in_pieces
from .weight_files import INDEX

SHARD_SIZE = "5GB"
"""What huggingface_hub takes where it is not told."""


class ShardWriter:
    """A checkpoint whose tensors are known by shape and type before any of them exists.

    Args:
        folder: where the shards go.
        layout: every tensor by name, on the meta device; they are divided among the shards in their order.
        shard_size: the most bytes of a shard, as ``5GB``; a larger tensor has one of its own.
    """

    def __init__(self, folder: Path, layout: dict[str, Tensor], shard_size: str = SHARD_SIZE) -> None:
        self.folder = folder
        self.layout = layout
        self.split: StateDictSplit = split_torch_state_dict_into_shards(layout, max_shard_size=shard_size)

    @property
    def files(self) -> list[str]:
        """The names of the shards, in the order of the layout."""
        return list(self.split.filename_to_tensors)

    def write(self, file: str, fetch: Callable[[str], Iterable[Tensor]]) -> None:
        """Writes one shard and reads it back.

        Args:
            file: one of `files`.
            fetch: gives a tensor by its name, as flat pieces one behind the other.

        Raises:
            VerificationError: a tensor has not the size or type of the layout, is not finite, or is read back
                differently.
        """
        layout = {name: self.layout[name] for name in self.split.filename_to_tensors[file]}
        pieces = ((name, _sound(name, fetch(name), layout[name])) for name in file_order(layout))
        with replacing(self.folder / file) as temporary, open(temporary, "wb") as opened:
            written = write_tensors_in_pieces(opened, layout, pieces)
        saved = SafetensorsReader(self.folder, file)
        for name, expected in written.items():
            if checksum(saved.pieces(name)) != expected:
                raise VerificationError(f"{name} was not read back from {file} as it was written; check the disk.")

    def write_index(self) -> None:
        """Writes the index of a checkpoint with more than one shard."""
        if not self.split.is_sharded:
            return
        parameters = sum(tensor.numel() for tensor in self.layout.values())
        index = {
            "metadata": {"total_parameters": parameters, **self.split.metadata},
            "weight_map": dict(sorted(self.split.tensor_to_filename.items())),
        }
        write_json(self.folder / INDEX, index)


def _sound(name: str, pieces: Iterable[Tensor], planned: Tensor) -> Iterator[Tensor]:
    size = 0
    for piece in pieces:
        size += piece.numel()
        if piece.dtype != planned.dtype or size > planned.numel():
            raise _misfit(name, size, piece.dtype, planned)
        # PyTorch does not look into a float8.
        values = piece.float() if piece.dtype.itemsize == 1 else piece
        if piece.is_floating_point() and not torch.isfinite(values).all():
            raise VerificationError(f"{name} is not finite; nothing was published.")
        yield piece
    if size != planned.numel():
        raise _misfit(name, size, planned.dtype, planned)


def _misfit(name: str, size: int, dtype: torch.dtype, planned: Tensor) -> VerificationError:
    return VerificationError(
        f"{name} has {size} values or more of {dtype}, not the {planned.numel()} of {planned.dtype} that were planned."
    )
