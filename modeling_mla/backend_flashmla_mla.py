"""Absorbed attention by DeepSeek's FlashMLA: Hopper GPUs, DeepSeek's widths.

Packages ``flash-mla`` (its source of before October 2026) and ``sgl-flash-mla``, which kept the dense kernels.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .backend_base_mla import AbsorbedShape
from .kernel_packages_mla import (
    DEEPSEEK_RANK,
    DEEPSEEK_ROPE,
    installed,
    load,
    pages,
    why_no_gpu,
    why_not_deepseek,
    why_not_from_zero,
    why_trial_fails,
)
from .latent_tiles_mla import CodedLatents
from .masks_mla import RowBounds, VisibleKeys

_MODULE = "flash_mla"
_HOPPER = (9, 0)


class FlashMLABackend:
    """Reads pages of 64 rows, which a latent buffer is where it lies."""

    name = "flashmla"
    serves = (
        f"NVIDIA GPUs of sm90; bfloat16, float16; rank {DEEPSEEK_RANK} and rotary keys of {DEEPSEEK_ROPE}, causal, "
        "padding on the right; no other mask, no window, no softcap, no codes, no gradient"
    )

    def __init__(self) -> None:
        self._planned: tuple[tuple, RowBounds | None, Any] | None = None

    def why_unavailable(self, device: torch.device) -> str | None:
        """None on a Hopper GPU where a trial gives the right result; else the reason why not."""
        if installed(_MODULE) is None:
            return "the package flash-mla (or sgl-flash-mla) is not installed"
        return why_no_gpu(device, _HOPPER, _HOPPER) or why_trial_fails(self, device, DEEPSEEK_RANK, DEEPSEEK_ROPE)

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for DeepSeek's widths over runs of keys that begin with the cache; else the reason why not."""
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
        """Attends to pages of rows, as `AbsorbedBackend.attend` says."""
        assert isinstance(latents, torch.Tensor)
        package, bounds, paged = load(_MODULE), visible.bounds(query.shape[0]), pages(latents)
        assert bounds is not None
        context, lse = package.flash_mla_with_kvcache(
            query.transpose(1, 2).contiguous(),
            paged.rows.unsqueeze(2),
            paged.table,
            bounds.ends,
            kv_lora_rank,
            self._schedule(package, query, visible, bounds),
            softmax_scale=scale,
            causal=bounds.causal,
            **_options(package.flash_mla_with_kvcache),
        )
        return context.transpose(1, 2), lse

    def _schedule(self, package: Any, query: torch.Tensor, visible: VisibleKeys, bounds: RowBounds) -> Any:
        """How the work is split, which the package finds out in one layer's call for all layers of a step."""
        # Without a mask, lengths follow from the shapes; else they are those of the bounds.
        given = None if visible.attention_mask is None else bounds
        facts = (package, query.shape[:3], query.device, bounds.causal, visible.keys_in_use)
        if self._planned is None or self._planned[0] != facts or self._planned[1] is not given:
            self._planned = (facts, given, package.get_mla_metadata()[0])
        return self._planned[2]


@functools.cache
def _options(function: Any) -> dict[str, bool]:
    return {"use_legacy": True} if "use_legacy" in inspect.signature(function).parameters else {}
