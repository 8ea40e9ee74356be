"""Files that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConversionError, OutputError

_UMASK = os.umask(0o022)
os.umask(_UMASK)
"""Reading it means setting it. Files of safetensors are otherwise their owner's alone."""


_NOTHING = 2**16
"""Bytes; with fewer free a disk is full. PyTorch says of that nothing but that positions in its file are unexpected."""


@contextmanager
def refusing_full_disk(path: Path) -> Iterator[None]:
    """Raises `OutputError` where anything that writes ``path``, or into it, finds the disk full."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        if not _is_of_full_disk(error) and _free(path) >= _NOTHING:
            raise
        raise OutputError(f"no space left while writing {path}; free some and run the same command again.") from error


def _is_of_full_disk(error: BaseException | None) -> bool:
    """Libraries in Rust tell the number in their message only."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; what was written there takes its place, durably.

    Raises:
        OutputError: the disk is full.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with refusing_full_disk(path):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes plain values as JSON. Raises `ValueError` for a number that JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; the same tensors give the same bytes."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def require_space(folder: Path, needed: int) -> None:
    """Raises `OutputError` where the disk of ``folder``, which may not exist yet, has fewer than ``needed`` bytes."""
    free = _free(folder)
    if free < needed:
        raise OutputError(
            f"the conversion takes {decimal(needed)} in {folder}, where {decimal(free)} are free; "
            "free some or choose another output folder."
        )


def _free(path: Path) -> int:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def publishing(output: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``output``, which gets that name when the block ends, and is deleted if it fails.

    Raises:
        OutputError: ``output`` exists, cannot be written, or the disk is full.
    """
    if os.path.lexists(output):
        raise OutputError(f"{output} exists already; choose another output, or move it away.")
    work = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{work.parent} cannot be written ({error.strerror}); choose another output.") from error
    try:
        with refusing_full_disk(output):
            yield work
            work.rename(output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
