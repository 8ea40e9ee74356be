"""Which files of a checkpoint's folder hold its weights: those that Transformers loads; where it is unclear, none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError
from .json_fields import read_fields
from .paths import inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SUFFIX = ".safetensors"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_DISTRIBUTED = ".metadata"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FETCH = "fetch the model again"


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights, by their names in its folder, sorted.

    ``index`` is the file that names them, and ``promised`` are the tensors that it lists: None and empty where a single
    file needs no index.
    """

    files: tuple[str, ...]
    index: str | None = None
    promised: tuple[str, ...] = ()


def weight_files(folder: Path, explicit: str | None = None) -> WeightFiles:
    """Finds the weights of the checkpoint in ``folder``.

    ``explicit`` is the file that the configuration names (``transformers_weights``); it goes before all others.

    Raises:
        SourceError: there are none, an index is damaged, a file lies elsewhere, or it depends on what is installed and
            on the order of a search which ones would be loaded.
    """
    _refuse_more_than_weights(folder)
    if explicit is not None:
        return _of_index(folder, explicit) if explicit.endswith(f"{_SUFFIX}.index.json") else _single(folder, explicit)
    single, index = inside(folder, SINGLE).is_file(), inside(folder, INDEX).is_file()
    if single and index:
        raise SourceError(
            f"{folder} holds {SINGLE}, which Transformers would load, and {INDEX}, which names other files; "
            "move one of the two away."
        )
    if index:
        return _of_index(folder, INDEX)
    if not single:
        pickled = next((name for name in _PICKLES if (folder / name).is_file()), None)
        what = f"{pickled}, which is not read because pickles run code" if pickled else "no weights"
        raise SourceError(f"{folder} holds {what}; give {SINGLE}, shards with {INDEX}, or a GGUF file.")
    return WeightFiles((SINGLE,))


def _refuse_more_than_weights(folder: Path) -> None:
    for name in _ADAPTERS:
        if (folder / name).exists():
            raise SourceError(
                f"{folder} holds an adapter ({name}), which Transformers would add to the weights; merge it into them "
                "(merge_and_unload of PEFT), or move it away."
            )
    if (folder / _DISTRIBUTED).exists():
        raise SourceError(
            f"{folder} holds a distributed checkpoint ({_DISTRIBUTED}), which is not read; load it with Transformers "
            "and save it again."
        )


def _single(folder: Path, name: str) -> WeightFiles:
    if not name.endswith(_SUFFIX):
        raise SourceError(f"transformers_weights of {folder} is {name!r}, no {_SUFFIX} file and no index of them.")
    return WeightFiles((name,))


def _of_index(folder: Path, index: str) -> WeightFiles:
    """What Transformers requires of an index, and that its files are where and what they should be."""
    path = inside(folder, index)
    fields = read_fields(path)
    named = fields.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise SourceError(f"{path} has no weight_map from tensors to files; {_FETCH}.")
    if not isinstance(fields.get("metadata"), dict):
        raise SourceError(
            f'{path} has no "metadata", without which Transformers does not load it; add "metadata": {{}}.'
        )
    for tensor, file in named.items():
        if not isinstance(file, str):
            raise SourceError(f"{path} names {file!r} as the file of tensor {tensor}, which is no name; {_FETCH}.")
        if not file.endswith(_SUFFIX):
            raise SourceError(f"{path} names {file!r} as the file of tensor {tensor}; only {_SUFFIX} files are read.")
    return WeightFiles(tuple(sorted(set(named.values()))), index, tuple(named))
