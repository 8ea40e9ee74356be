"""A public model's attention without its weights: all else of the model is shrunk, and random."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conversion.reporting.cache_size import read_config

_SHRUNK = {
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "intermediate_size": 1024,
    "first_k_dense_replace": 2,
    "mlp_layer_types": ["dense", "dense"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def shrunk_model(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Two layers of the text model of a configuration file, with small dense MLPs and a small vocabulary."""
    config = read_config(file).get_text_config(decoder=True)
    for field, value in _SHRUNK.items():
        if hasattr(config, field):
            setattr(config, field, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()
