"""Absorbed attention by FlashAttention-3, whose ``qv`` is a second query against the values: Hopper GPUs.

Packages ``flash-attn-3`` (built from source) and ``fa3-fwd`` (a wheel without float16, windows and pages).
"""

from __future__ import annotations

import functools

import torch

from .backend_base_mla import AbsorbedShape
from .kernel_packages_mla import installed, load, why_no_gpu, why_not_plain, why_not_runs, why_trial_fails
from .latent_tiles_mla import CodedLatents
from .masks_mla import VisibleKeys

_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
_HOPPER = (9, 0)
_RANKS = (256, 512)
_MAX_ROPE = 64
_ALIGNMENT = 8
"""Of the channels of a row: the kernels load 16 bytes at once."""


class FlashAttention3Backend:
    """The rotary key is FlashAttention's key, the latent its value; the scores are the sum of both products."""

    name = "fa3"
    serves = (
        f"NVIDIA GPUs of sm90; bfloat16, in full builds float16; ranks {_RANKS[0]} to {_RANKS[1]}, rotary keys of "
        f"{_ALIGNMENT} to {_MAX_ROPE}, causal, padding on either side, softcap, in full builds windows; no other mask, "
        "no codes, no gradient"
    )

    def why_unavailable(self, device: torch.device) -> str | None:
        """None on a Hopper GPU where a trial gives the right result; else the reason why not."""
        if installed(*_MODULES) is None:
            return "neither flash-attn-3 nor fa3-fwd is installed"
        return why_no_gpu(device, _HOPPER, _HOPPER) or why_trial_fails(self, device, _RANKS[1], _MAX_ROPE)

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for the widths that the kernels have, over runs of keys; else the reason why not."""
        reason = why_not_plain(shape)
        if reason is not None:
            return reason
        if not _RANKS[0] <= shape.kv_lora_rank <= _RANKS[1] or shape.kv_lora_rank % _ALIGNMENT:
            return f"it takes ranks {_RANKS[0]} to {_RANKS[1]} that {_ALIGNMENT} divides, not {shape.kv_lora_rank}"
        if not 0 < shape.qk_rope_head_dim <= _MAX_ROPE or shape.qk_rope_head_dim % _ALIGNMENT:
            return (
                f"it takes rotary keys of {_ALIGNMENT} to {_MAX_ROPE} channels that {_ALIGNMENT} divides, not "
                f"{shape.qk_rope_head_dim}"
            )
        lacks = _lacking()
        if shape.dtype == torch.float16 and "FP16" in lacks:
            return "this build takes no float16"
        if shape.softcap is not None and "SOFTCAP" in lacks:
            return "this build takes no softcap"
        reason = why_not_runs(shape)
        if reason is not None or shape.visible is None or "LOCAL" not in lacks:
            return reason
        bounds = shape.visible.bounds(shape.batch)
        return "this build takes no window" if bounds is not None and bounds.window is not None else None

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor | CodedLatents,
        kv_lora_rank: int,
        scale: float,
        visible: VisibleKeys,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends to rows where they lie, as `AbsorbedBackend.attend` says."""
        assert isinstance(latents, torch.Tensor)
        bounds = visible.bounds(query.shape[0])
        assert bounds is not None
        by_token, rows = query.transpose(1, 2), latents.unsqueeze(2)
        context, lse, *_ = load(*_MODULES).flash_attn_with_kvcache(
            by_token[..., kv_lora_rank:],
            k_cache=rows[..., kv_lora_rank:],
            v_cache=rows[..., :kv_lora_rank],
            qv=by_token[..., :kv_lora_rank],
            cache_seqlens=bounds.ends,
            cache_leftpad=None if bounds.from_zero else bounds.starts,
            softmax_scale=scale,
            causal=bounds.causal,
            window_size=(-1, -1) if bounds.window is None else (bounds.window - 1, 0),
            softcap=softcap or 0.0,
            return_softmax_lse=True,
        )
        return context.transpose(1, 2), lse


@functools.cache
def _lacking() -> tuple[str, ...]:
    """What a build leaves out, by the names of its flags; FlashAttention writes them beside its interface."""
    config = "fa3_fwd_config" if installed(_MODULES[0]) is None else "flash_attn_config"
    flags = load(config).CONFIG["build_flags"] if installed(config) is not None else {}
    return tuple(name.rpartition("DISABLE_")[2] for name, off in flags.items() if off)
