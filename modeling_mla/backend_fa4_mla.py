"""Absorbed attention by FlashAttention-4, whose ``qv`` is a second query against the values: Blackwell GPUs.

The package ``flash-attn-4`` compiles its kernels when they are called first.
"""

from __future__ import annotations

import torch

from .backend_base_mla import AbsorbedShape
from .kernel_packages_mla import (
    DEEPSEEK_RANK,
    DEEPSEEK_ROPE,
    installed,
    load,
    why_no_gpu,
    why_not_deepseek,
    why_not_from_zero,
    why_trial_fails,
)
from .latent_tiles_mla import CodedLatents
from .masks_mla import VisibleKeys

_MODULE = "flash_attn.cute"
_LEAST, _MOST = (10, 0), (11, 0)
_HEADS = 128


class FlashAttention4Backend:
    """The rotary key is FlashAttention's key, the latent its value; the scores are the sum of both products."""

    name = "fa4"
    serves = (
        f"NVIDIA GPUs of sm100 to sm110; bfloat16, float16; rank {DEEPSEEK_RANK}, rotary keys of {DEEPSEEK_ROPE}, "
        f"at most {_HEADS} heads, causal, padding on the right; no other mask, no window, no softcap, no "
        "codes, no gradient"
    )

    def why_unavailable(self, device: torch.device) -> str | None:
        """None on a Blackwell GPU where a trial gives the right result; else the reason why not."""
        if installed(_MODULE) is None:
            return "flash-attn-4 is not installed"
        return why_no_gpu(device, _LEAST, _MOST) or why_trial_fails(self, device, DEEPSEEK_RANK, DEEPSEEK_ROPE)

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for DeepSeek's widths, over runs of keys from the first one on; else the reason why not."""
        if shape.num_heads > _HEADS:
            return f"it takes at most {_HEADS} heads, not {shape.num_heads}"
        return why_not_deepseek(shape) or why_not_from_zero(shape)

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
        context, lse = load(_MODULE).flash_attn_varlen_func(
            by_token[..., kv_lora_rank:],
            rows[..., kv_lora_rank:],
            rows[..., :kv_lora_rank],
            qv=by_token[..., :kv_lora_rank],
            seqused_k=None if bounds.to_last else bounds.ends,
            softmax_scale=scale,
            causal=bounds.causal,
            # As many splits of the context as fill the GPU; one by default, for prompts.
            num_splits=0,
            return_lse=True,
        )
        return context.transpose(1, 2), lse.transpose(1, 2)
