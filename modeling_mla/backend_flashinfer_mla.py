"""Absorbed attention by FlashInfer's wrapper for paged latents: NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import math
from typing import Any

import torch

from .backend_base_mla import AbsorbedShape
from .kernel_packages_mla import (
    PAGE,
    Pages,
    installed,
    load,
    pages,
    why_no_gpu,
    why_not_from_zero,
    why_not_plain,
    why_trial_fails,
)
from .latent_tiles_mla import CodedLatents
from .masks_mla import RowBounds, VisibleKeys

_PACKAGE, _MODULE = "flashinfer", "flashinfer.mla"
_AMPERE, _HOPPER = (8, 0), (9, 0)
_RANK_STEP, _HOPPER_RANKS = 128, (128, 256, 512)
_ROPE_STEP = 64
_WORKSPACE = 128 << 20
"""Bytes that FlashInfer recommends."""


class FlashInferBackend:
    """Plans once for the layers of a step that are alike, then runs layer by layer."""

    name = "flashinfer"
    serves = (
        f"NVIDIA GPUs from sm80; bfloat16, float16; ranks that {_RANK_STEP} divides, on sm90 "
        f"{', '.join(map(str, _HOPPER_RANKS))}, rotary keys that {_ROPE_STEP} divides or none, causal, padding on the "
        "right; no other mask, no window, no softcap, no codes, no gradient"
    )

    def __init__(self) -> None:
        self._wrappers: dict[torch.device, Any] = {}
        self._planned: dict[torch.device, tuple[tuple, RowBounds | None]] = {}

    def why_unavailable(self, device: torch.device) -> str | None:
        """None on an NVIDIA GPU where a trial gives the right result; else the reason why not."""
        if installed(_PACKAGE) is None:
            return "the package flashinfer-python is not installed"
        return why_no_gpu(device, _AMPERE) or why_trial_fails(self, device, 512, _ROPE_STEP)

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for the widths that it compiles, over runs of keys that begin with the cache; else why not."""
        reason = why_not_plain(shape)
        if reason is not None:
            return reason
        if shape.kv_lora_rank <= 0 or shape.kv_lora_rank % _RANK_STEP:
            return f"it takes ranks that {_RANK_STEP} divides, not {shape.kv_lora_rank}"
        if shape.qk_rope_head_dim % _ROPE_STEP:
            return f"it takes rotary keys that {_ROPE_STEP} divides, not {shape.qk_rope_head_dim}"
        if shape.softcap is not None:
            return "it takes no softcap"
        on_hopper = shape.device.type == "cuda" and torch.cuda.get_device_capability(shape.device) == _HOPPER
        if on_hopper and shape.kv_lora_rank not in _HOPPER_RANKS:
            return f"on this GPU it takes ranks {_HOPPER_RANKS}, not {shape.kv_lora_rank}"
        return why_not_from_zero(shape)

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
        batch, heads, length, _ = query.shape
        paged, bounds = pages(latents), visible.bounds(batch)
        assert bounds is not None
        # Without a mask, lengths follow from the shapes; else they are those of the bounds.
        given = None if visible.attention_mask is None else bounds
        wrapper = self._wrapper(query, paged, bounds, kv_lora_rank, scale, (visible.keys_in_use, given))
        rows = query.transpose(1, 2).reshape(batch * length, heads, -1)
        context, lse = wrapper.run(
            rows[..., :kv_lora_rank].contiguous(),
            rows[..., kv_lora_rank:].contiguous(),
            paged.rows[..., :kv_lora_rank],
            paged.rows[..., kv_lora_rank:],
            return_lse=True,
        )
        # To the base of 2, as its kernels count.
        lse = lse.unflatten(0, (batch, length)).transpose(1, 2) * math.log(2)
        return context.unflatten(0, (batch, length)).transpose(1, 2), lse

    def _wrapper(
        self, query: torch.Tensor, paged: Pages, bounds: RowBounds, kv_lora_rank: int, scale: float, lengths: tuple
    ) -> Any:
        """FlashInfer's wrapper with a plan for this call; ``lengths`` is what, beside the shapes, it was made of."""
        device = query.device
        if device not in self._wrappers:
            workspace = torch.empty(_WORKSPACE, dtype=torch.int8, device=device)
            self._wrappers[device] = load(_MODULE).BatchMLAPagedAttentionWrapper(workspace)
        wrapper, known = self._wrappers[device], self._planned.get(device)
        facts = (query.shape, query.dtype, kv_lora_rank, scale, bounds.causal, paged.rows.shape, lengths[0])
        if known is not None and known[0] == facts and known[1] is lengths[1]:
            return wrapper
        batch, heads, length, width = query.shape
        counts = (bounds.ends + PAGE - 1) // PAGE
        used = torch.arange(paged.table.shape[1], device=device) < counts[:, None]
        wrapper.plan(
            torch.arange(batch + 1, dtype=torch.int32, device=device) * length,
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
            paged.table[used],
            bounds.ends,
            heads,
            kv_lora_rank,
            width - kv_lora_rank,
            PAGE,
            bounds.causal,
            scale,
            query.dtype,
            paged.rows.dtype,
        )
        self._planned[device] = (facts, lengths[1])
        return wrapper
