"""One converted layer in a file: what a resumed run finds again."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from safetensors import safe_open

from modeling_mla.latent_code_mla import LatentCode

from ...checkpoint.atomic import write_tensors
from ...layers import MLAWeights

_LAYOUT = "layout"
_CODE = "code"


def write_layer(path: Path, weights: MLAWeights) -> None:
    """Writes all of a layer, tensors and sizes."""
    values = {field.name: getattr(weights, field.name) for field in fields(weights) if field.name != _CODE}
    sizes = {name: value for name, value in values.items() if isinstance(value, int)}
    tensors = {name: value for name, value in values.items() if name not in sizes and value is not None}
    code = None if weights.code is None else weights.code.to_dict()
    write_tensors(path, tensors, metadata={_LAYOUT: json.dumps(sizes), _CODE: json.dumps(code)})


def read_layer(path: Path) -> MLAWeights:
    """The layer that `write_layer` wrote, bit for bit."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iteration over the file)
        code = json.loads(file.metadata()[_CODE])
        return MLAWeights(
            **tensors,
            **json.loads(file.metadata()[_LAYOUT]),
            code=None if code is None else LatentCode.from_dict(code),
        )
