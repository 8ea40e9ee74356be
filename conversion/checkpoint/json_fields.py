"""The JSON files of a stranger's checkpoint: read with care, and what of them may go into another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import SourceError, first_line

FLOATS = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
"""The types of weights that are converted, by name."""
_SIZES = {
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 0,
    "vocab_size": 1,
    "max_position_embeddings": 2,
    "num_hidden_layers": 1,
}
"""Fields that are sizes, and their smallest values."""
_LARGEST = 2**31 - 1
_LARGEST_WHOLE = 2**63 - 1
"""That PyTorch has."""
_MOST_LAYERS = 2**10

_NOT_PASSED_ON = {
    # Code, and what a loader would ask the Hub for.
    "auto_map",
    "custom_generate",
    "custom_pipelines",
    "attn_implementation",
    "experts_implementation",
    "fusion_config",
    "kernel_config",
    "trust_remote_code",
    "code_revision",
    # Where and how the files of the source were loaded, on somebody's machine.
    "_commit_hash",
    "_name_or_path",
    "adapter_kwargs",
    "force_download",
    "is_local",
    "local_files_only",
    "name_or_path",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "transformers_weights",
}
_PLACES = ("_dir", "_file", "_files", "_folder", "_path", "_paths")


def passed_on(field: str) -> bool:
    """Whether a checkpoint that is made from this one may have ``field``: it names neither code nor a place.

    The field is one of ``config.json``, ``generation_config.json`` or ``tokenizer_config.json``.
    """
    return field not in _NOT_PASSED_ON and not field.endswith(_PLACES)


def read_fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `SourceError` where there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing; give a checkpoint in Transformers' format, or a GGUF file.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is damaged, no UTF-8 JSON ({first_line(error)}); fetch the model again.") from error
    if not isinstance(fields, dict):
        raise SourceError(f"{path} holds {type(fields).__name__}, not the fields of an object; fetch the model again.")
    return fields


def check_config(path: Path) -> dict[str, Any]:
    """The fields of a ``config.json``, before anything is made as large as they say.

    Raises:
        SourceError: it cannot be read, a size is out of range, or the type of the weights is none.
    """
    fields = read_fields(path)
    check_sizes(str(path), fields)
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if isinstance(value, str) and not isinstance(getattr(torch, value, None), torch.dtype):
            raise SourceError(f"{name} in {path} is {value!r}, no type of PyTorch; write one of {', '.join(FLOATS)}.")
    explicit = fields.get("transformers_weights")
    if explicit is not None and not isinstance(explicit, str):
        raise SourceError(f"transformers_weights in {path} is {explicit!r}; it must name a file.")
    return fields


def check_sizes(where: str, fields: Mapping[str, Any]) -> None:
    """Raises `SourceError` where a size among the fields of a configuration is out of range."""
    for name, smallest in _SIZES.items():
        value, largest = fields.get(name), _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
        if isinstance(value, int) and not smallest <= value <= largest:
            raise SourceError(f"{name} in {where} is {value}; it must be {smallest} to {largest}.")
    for name, value in fields.items():
        if isinstance(value, int) and not -_LARGEST_WHOLE <= value <= _LARGEST_WHOLE:
            raise SourceError(f"{name} in {where} is {value}; whole numbers end at {_LARGEST_WHOLE}.")


def check_tokenizer_config(path: Path) -> None:
    """Raises `SourceError` where a ``tokenizer_config.json`` cannot be read, or names files elsewhere."""
    named = read_fields(path).get("fast_tokenizer_files", [])
    for file in named if isinstance(named, list) else [named]:
        if not isinstance(file, str) or Path(file).name != file:
            raise SourceError(f"fast_tokenizer_files in {path} names {file!r}, which is not in the folder.")
