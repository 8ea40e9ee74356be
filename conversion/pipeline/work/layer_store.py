"""One converted layer in a file: what a resumed run finds again."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from safetensors import safe_open

from ...checkpoint.atomic import write_tensors
from ...layers import MLAWeights

_LAYOUT = "layout"


def write_layer(path: Path, weights: MLAWeights) -> None:
    """Writes all of a layer, tensors and sizes."""
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    sizes = {name: value for name, value in values.items() if isinstance(value, int)}
    tensors = {name: value for name, value in values.items() if name not in sizes and value is not None}
    write_tensors(path, tensors, metadata={_LAYOUT: json.dumps(sizes)})


def read_layer(path: Path) -> MLAWeights:
    """The layer that `write_layer` wrote, bit for bit."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iteration over the file)
        return MLAWeights(**tensors, **json.loads(file.metadata()[_LAYOUT]))
