"""The configuration that a source's exact form would have, from the source's configuration alone."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from ..methods.exact import ExactMethod
from ..sources import SourceModel


def exact_config(source: SourceModel, dtype: torch.dtype) -> PreTrainedConfig:
    """Of weights of ``dtype``; all but its sizes is that of a compressed form too."""
    weights, method = source.without_weights().attention(0), ExactMethod()
    # Layers may rotate differently, and are alike otherwise.
    geometries = map(source.geometry, range(source.num_layers))
    converted = (method.factorise(geometry, weights, None, method.smallest(geometry)) for geometry in geometries)
    return source.mla_config(converted, dtype)
