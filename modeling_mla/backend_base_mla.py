"""What a backend for absorbed attention is given, and what it gives.

A backend knows tensors, nothing of the model: multi-query attention over the latents themselves.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from .latent_code_mla import LatentCode
from .latent_tiles_mla import CodedLatents
from .masks_mla import VisibleKeys


class AbsorbedShape(NamedTuple):
    """What a backend decides by, before any tensor is touched.

    ``visible`` is what `AbsorbedBackend.attend` is given; without it, whatever hides keys counts as a dense mask.
    """

    batch: int
    num_heads: int
    query_length: int
    kv_length: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    dtype: torch.dtype
    device: torch.device
    has_mask: bool
    softcap: float | None = None
    code: LatentCode | None = None
    visible: VisibleKeys | None = None


class AbsorbedBackend(Protocol):
    """One provider of absorbed attention."""

    name: str
    serves: str
    """What it takes, in a few words for people: devices, dtypes, widths, masks."""

    def why_unavailable(self, device: torch.device) -> str | None:
        """None where it runs on this device of this machine, else the reason why not.

        The registry asks once for every device and keeps the answer, so this may import packages and try kernels.
        """

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None where it can serve the shape, on a device on which it is available; else the reason why not.

        Asked at every call, so it touches no tensor but a mask, and this last. `backends_mla.why_not` asks for the
        device as well.
        """

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor | CodedLatents,
        kv_lora_rank: int,
        scale: float,
        visible: VisibleKeys,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends from every head to the one latent head.

        Args:
            query: ``[B, H, n, r + d_r]``, the absorbed query beside the rotary query.
            latents: ``[B, S, r + d_r]``, the latents beside the rotary keys; rows may be strided, channels are dense.
                Coded where the shape has a code: query and context are then rotated as what is in the codes.
            kv_lora_rank: r, how many of the channels are the value as well.
            scale: of the scores.
            visible: which of the S keys each query sees, as a mask or as what one would be made of.
            softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask.

        Returns:
            The context ``[B, H, n, r]`` in the query's dtype, and the log-sum-exp of the scores ``[B, H, n]`` in
            float32 or wider (natural logarithm; ``-inf`` where nothing is visible).
        """
