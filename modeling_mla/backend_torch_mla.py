"""Absorbed attention in plain PyTorch: the reference for every kernel, and the fast form on a CPU."""

from __future__ import annotations

import torch

from .backend_base_mla import AbsorbedShape
from .batched_attention_mla import attend_batched
from .latent_tiles_mla import CodedLatents, latent_tiles
from .masks_mla import VisibleKeys
from .tiled_attention_mla import attend_tiled

_BLOCK_SCORES = 1 << 18
"""Scores that are held at once for one sequence: more leave a processor's caches and take memory."""
_MIN_BLOCK = 1024


class TorchBackend:
    """Runs everywhere, at every shape and precision, over plain and coded latents.

    All heads read one latent head, so they are rows of one query matrix. On a CPU a sequence is two matrix products
    over its latents where they lie: batched products and attention with repeated heads would copy the cache.
    Accelerators take all sequences at once.
    """

    name = "torch"
    serves = "any device, dtype, width, mask and code"

    def why_unavailable(self, device: torch.device) -> str | None:
        """None, for it runs on every device."""
        return None

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None, for it serves every shape on every device."""
        return None

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor | CodedLatents,
        kv_lora_rank: int,
        scale: float,
        visible: VisibleKeys,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends as `AbsorbedBackend.attend` says; scores and softmax are float32, or float64 where the query is."""
        if query.device.type != "cpu":
            return attend_batched(query, latents, kv_lora_rank, scale, visible, softcap)
        # Few processors multiply in float16, and PyTorch's loop for the others is several times slower than with a
        # copy of the latents.
        widens = query.dtype == torch.float16
        tokens = _MIN_BLOCK if widens else max(_BLOCK_SCORES // (query.shape[1] * query.shape[2]), _MIN_BLOCK)

        def tiles(index: int, rows: torch.Tensor):
            return latent_tiles(rows.float() if widens else rows, latents, index, kv_lora_rank, tokens)

        return attend_tiled(query, kv_lora_rank, scale, visible, softcap, tiles)
