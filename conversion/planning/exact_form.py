"""The configuration that a source's exact form would have, from the source's configuration alone."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from transformers import PreTrainedConfig

from ..methods.exact import ExactMethod
from ..sources import SourceModel


def exact_config(source: SourceModel, dtype: torch.dtype) -> PreTrainedConfig:
    """Of weights of ``dtype``; all but its sizes is that of a compressed form too."""
    bare, method = source.without_weights(), ExactMethod()
    weights = bare.attention(0)
    held = {field.name: getattr(weights, field.name) for field in fields(weights)}
    weights = replace(weights, **{name: tensor.to("meta") for name, tensor in held.items() if tensor is not None})
    # Layers may rotate differently, and are alike otherwise.
    geometries = map(bare.geometry, range(bare.num_layers))
    converted = (method.factorise(geometry, weights, None, method.smallest(geometry)) for geometry in geometries)
    return source.mla_config(converted, dtype)
