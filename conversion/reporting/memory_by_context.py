"""What the caches of a source and of its converted form take, over the context."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from modeling_mla.configuration_mla import is_coded

from ..evaluation.verify import Verification
from ..sources import SourceModel
from .cache_size import cache_memory

CONTEXTS = tuple(2**power for power in range(10, 21))


def memory_by_context(
    source: SourceModel, converted: PreTrainedConfig, verification: Verification
) -> dict[str, list[int]]:
    """Bytes of one sequence, by ``contexts`` in tokens; a coded cache beside the source's in the source's own type.

    The first tokens, which a coded cache keeps as they are besides, are what the verification found.
    """
    dtype = converted.dtype or torch.float32
    before = replace(cache_memory(source.config), dtype=source.cache_dtype if is_coded(converted) else dtype)
    after = replace(cache_memory(converted), dtype=dtype)
    besides = max(0, verification.cache_bytes_held - after.bytes_at(verification.window))
    return {
        "contexts": list(CONTEXTS),
        "source": [before.bytes_at(tokens) for tokens in CONTEXTS],
        "converted": [after.bytes_at(tokens) + besides for tokens in CONTEXTS],
    }
