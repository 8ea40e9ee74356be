"""Paths: those that a user writes, and those by which a stranger's checkpoint names its files."""

from __future__ import annotations

import os
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from ..errors import ConversionError, OutputError, SourceError

_NEAR = 0.7
"""How alike two names are, by `difflib`, of which one may have been meant by the other."""


def expanded(path: str | Path) -> Path:
    """``path`` with a leading ``~`` replaced by the home folder. Raises `ConversionError` where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConversionError(
            f"{path} begins with the home folder of an unknown user; write the path in full."
        ) from error


def did_you_mean(path: str | Path) -> str:
    """A question behind the name of a ``path`` that is missing, where almost such a one is there; else nothing."""
    missing = expanded(path).absolute()
    for folder in missing.parents:
        if not folder.is_dir():
            continue
        first, *rest = missing.relative_to(folder).parts
        with suppress(OSError):
            names = [name for name in os.listdir(folder) if name.startswith(".") == first.startswith(".")]
            for close in get_close_matches(first, names, n=3, cutoff=_NEAR):
                if (folder / close).joinpath(*rest).exists():
                    given = Path(path).parts
                    return f" (did you mean {Path(*given[: len(given) - 1 - len(rest)], close, *rest)}?)"
        break
    return ""


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of the checkpoint in ``folder``; it may not exist.

    Raises:
        SourceError: it lies elsewhere, by its name or as a link, or is a link to nothing. Links of the Hub's cache from
            a snapshot to its blobs are followed.
    """
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise SourceError(f"{folder} names the file {name!r}, which is not in it; only files in the folder are read.")
    path = folder / name
    if not os.path.lexists(path):
        return path
    if not path.exists():
        raise SourceError(f"{path} is a link to {os.readlink(path)}, which does not exist; fetch or copy the file.")
    root = folder.resolve()
    if not path.resolve().is_relative_to(root) and not _is_cached(path, root):
        raise SourceError(f"{path} is a link out of the folder, to {path.resolve()}; copy the file into the folder.")
    return path


def _is_cached(path: Path, snapshot: Path) -> bool:
    """Whether ``path`` is the Hub client's own link: from ``snapshots/COMMIT`` to ``blobs``, whatever these are."""
    if snapshot.parent.name != "snapshots" or not path.is_symlink():
        return False
    target = Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))
    return target.parent == snapshot.parent.parent / "blobs"


def require_free(output: Path, companions: list[str]) -> None:
    """Refuses an output folder that cannot be made under its name.

    Args:
        output: the folder; those above it need not exist either.
        companions: names of files that will lie beside it while it is made.

    Raises:
        OutputError: a name is longer than its file system allows, or ``output`` is a link to nothing.
    """
    parent = next(folder for folder in output.absolute().parents if os.path.isdir(folder))
    longest = os.pathconf(parent, "PC_NAME_MAX")
    name = max([*output.absolute().relative_to(parent).parts, *companions], key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(name)) > longest:
        raise OutputError(
            f"the name of {output} is too long: {name} would have {len(os.fsencode(name))} bytes, {longest} are "
            "possible there; choose a shorter one."
        )
    if output.is_symlink() and not output.exists():
        raise OutputError(f"{output} is a link to {os.readlink(output)}, which does not exist; delete it first.")


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder and in those within it."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
