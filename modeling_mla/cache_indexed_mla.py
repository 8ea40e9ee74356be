"""The latent cache of a layer with sparse attention, whose indexer caches keys of its own."""

from __future__ import annotations

import torch
from typing_extensions import override

from .cache_layers_mla import LatentLayer
from .transformers_seams_mla import DynamicIndexedLayer


class IndexedLatentLayer(DynamicIndexedLayer, LatentLayer):
    """A `LatentLayer` with Transformers' store of indexer keys, ``[B, S, index_head_dim]``."""

    @property
    @override
    def nbytes(self) -> int:
        """Bytes of the latents, free capacity included, and of the indexer keys."""
        return super().nbytes + (self.indexer_keys.nbytes if self.indexer_keys is not None else 0)

    @override
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        # Both bases would select the indexer keys, one after the other.
        self.batch_select_indices(beam_idx)
