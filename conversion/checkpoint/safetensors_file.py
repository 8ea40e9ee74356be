"""Safetensors files a part at a time: https://github.com/huggingface/safetensors#format.

The library reads a tensor by mapping its file into memory, and writes one that is in memory whole. Here bytes are read
where they lie, and written as they come; the library still says whether a file is sound.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""The types of PyTorch by their names in a header, in the order in which the library sorts them: widest last."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_ALIGNMENT = 8


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """From the beginning of the file, in bytes."""


class SafetensorsFile:
    """One file. Nothing is kept open or in memory in between.

    Raises:
        SafetensorError: its header is not one, or does not fit its length.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as sound:
            names = set(sound.keys())
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self._entries = {name: _entry(header[name], 8 + length) for name in names}

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entries[name].shape

    def stored_as(self, name: str) -> str:
        """A tensor's type as the header has it, which need not be one of `DTYPES`."""
        return self._entries[name].dtype

    def values(self, name: str, first: int, count: int) -> Tensor:
        """So many values of a tensor that lie one behind the other, from the ``first`` on: ``[count]``."""
        with open(self.path, "rb", buffering=0) as file:
            return self._values(file, name, first, count)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows ``indices [n]`` of a matrix ``[R, C]``, ``[n, C]``: each of them is read once, and no other.

        Raises:
            IndexError: there is no such row.
        """
        rows, width = self.shape(name)
        wanted, places = indices.unique(return_inverse=True)
        if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < rows:
            raise IndexError(f"{name} has {rows} rows, and {wanted[0]} to {wanted[-1]} are wanted")
        found = torch.empty(len(wanted), width, dtype=DTYPES[self.stored_as(name)], device="cpu")
        with open(self.path, "rb", buffering=0) as file:
            for row, index in enumerate(wanted.tolist()):
                found[row] = self._values(file, name, index * width, width)
        return found[places]

    def _values(self, file: FileIO, name: str, first: int, count: int) -> Tensor:
        dtype = DTYPES[self.stored_as(name)]
        content = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
        view = content.numpy().data
        file.seek(self._entries[name].start + first * dtype.itemsize)
        while view:
            read = file.readinto(view)
            if not read:
                raise SafetensorError(f"{self.path} ends within {name}")
            view = view[read:]
        return content.view(dtype)


def _entry(fields: dict[str, Any], data: int) -> _Entry:
    return _Entry(fields["dtype"], tuple(fields["shape"]), data + fields["data_offsets"][0])


def write_tensors_in_pieces(
    file: BinaryIO, layout: Mapping[str, Tensor], pieces: Iterable[tuple[str, Iterable[Tensor]]]
) -> dict[str, int]:
    """Writes a safetensors file, the bytes that the library would write, with a piece of a tensor in memory at a time.

    Args:
        file: opened for writing, empty.
        layout: every tensor on the meta device.
        pieces: every tensor by its name in the order of `file_order`, as flat parts one behind the other.

    Returns:
        A checksum of each tensor's bytes, `checksum`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in file_order(layout):
        tensor = layout[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: checksum(parts, file) for name, parts in pieces}


def file_order(layout: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors in the order in which they lie in a file: the widest types first, all aligned."""
    return sorted(layout, key=lambda name: (-_ORDER[layout[name].dtype], name))


def checksum(pieces: Iterable[Tensor], file: BinaryIO | None = None) -> int:
    """The CRC-32 of the bytes of flat tensors one behind the other, which are written to ``file`` on the way."""
    found = 0
    for piece in pieces:
        content = piece.contiguous().view(torch.uint8).numpy().data
        found = zlib.crc32(content, found)
        if file is not None:
            file.write(content)
    return found
