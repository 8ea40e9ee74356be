"""What a cache holds: measured on one, not computed."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from modeling_mla.cache_mla import LatentCache
from modeling_mla.configuration_mla import latent_widths


def held_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the cache of one sequence holds: codes, scales, first tokens and what is allocated ahead.

    Args:
        config: of a converted model.
        tokens: of the sequence, cached at once.
        dtype: of the model.
    """
    total = 0
    for layer in range(config.num_hidden_layers):
        # One layer at a time is in memory.
        cache = LatentCache(config=config)
        cache.update(*(torch.zeros(1, 1, tokens, width, dtype=dtype) for width in latent_widths(config, layer)), layer)
        total += cache.nbytes
    return total
