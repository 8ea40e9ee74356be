"""The registry of backends for absorbed attention: multi-query attention over the latents themselves.

A backend is one file, ``backend_<name>_mla.py``, and one line in :data:`BACKENDS`. It knows tensors, nothing of the
model. The plain torch one is the reference for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers.utils import logging

from .backend_cpu_mla import CpuBackend
from .backend_torch_mla import TorchBackend
from .backend_triton_mla import TritonBackend
from .masks_mla import VisibleKeys

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AbsorbedShape:
    """What a backend decides by, before any tensor is touched."""

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


class AbsorbedBackend(Protocol):
    """One provider of absorbed attention."""

    name: str

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None where it can serve the shape on this machine, else the reason why not."""

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        kv_lora_rank: int,
        scale: float,
        visible: VisibleKeys,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends from every head to the one latent head.

        Args:
            query: ``[B, H, n, r + d_r]``, the absorbed query beside the rotary query.
            latents: ``[B, S, r + d_r]``, the latents beside the rotary keys; rows may be strided, channels are dense.
            kv_lora_rank: r, how many of the channels are the value as well.
            scale: of the scores.
            visible: which of the S keys each query sees, as a mask or as what one would be made of.
            softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask.

        Returns:
            The context ``[B, H, n, r]`` in the query's dtype, and the log-sum-exp of the scores ``[B, H, n]`` in
            float32 or wider (natural logarithm; ``-inf`` where nothing is visible).
        """


_IN_ORDER: tuple[AbsorbedBackend, ...] = (CpuBackend(), TritonBackend(), TorchBackend())
BACKENDS = {backend.name: backend for backend in _IN_ORDER}
"""In order of preference for ``auto``."""


def select_backend(requested: str, shape: AbsorbedShape) -> AbsorbedBackend:
    """The backend for a shape: the first that supports it, or the requested one.

    Raises:
        ValueError: the requested one is unknown or cannot serve the shape, with its reason.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise ValueError(f"Unknown MLA backend {requested!r}; known are auto, {', '.join(BACKENDS)}.")
        reason = BACKENDS[requested].supports(shape)
        if reason is not None:
            raise ValueError(f"MLA backend {requested!r} cannot serve this attention: {reason}. Use backend 'auto'.")
        return BACKENDS[requested]
    for backend in BACKENDS.values():
        if backend.supports(shape) is None:
            if not torch.compiler.is_compiling():
                logger.info_once(f"Absorbed attention runs on the {backend.name} backend.")
            return backend
    raise ValueError(f"No MLA backend serves {shape}.")
