"""Latents and rotary keys of a window as a coded cache gives them back."""

from __future__ import annotations

from torch import Tensor

from modeling_mla.coded_states_mla import LatentCodec
from modeling_mla.latent_code_mla import LatentCode

from ..layers import AttentionGeometry


def as_cached(
    geometry: AttentionGeometry, code: LatentCode, latents: Tensor, rotary_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes a window that begins a sequence to a cache, and reads it.

    Args:
        geometry: of the layer; one with a sliding window keeps no first tokens exact.
        code: of the layer's cache.
        latents: ``[S, r]``.
        rotary_keys: ``[S, d_r]``, rotated.

    Returns:
        Both as they are read, in their own type.
    """
    codec = LatentCodec(code, latents.dtype, latents.device)
    written = codec.rotated(latents, rotary_keys)[None]
    exact = written[:, : code.exact_tokens if geometry.sliding_window is None else 0]
    kept_latents, kept_keys = codec.states(codec.encode(written), exact, (0,))
    return kept_latents.decode()[0, 0], kept_keys.decode()[0, 0]
