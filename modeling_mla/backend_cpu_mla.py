"""Absorbed attention by PyTorch's fused kernel for CPUs: float32, and fewer bits over short contexts, in one pass."""

from __future__ import annotations

import torch

from .backend_base_mla import AbsorbedShape
from .latent_tiles_mla import CodedLatents
from .masks_mla import VisibleKeys

_MIN_SPLIT_LENGTH = 512
"""Below this context one thread is as fast."""
_WIDENED_VALUES, _DECODED_VALUES = 1 << 17, 3 << 17
"""Values of a sequence's queries and latents up to which 16-bit numbers, and codes, are copied to float32."""


class CpuBackend:
    """Splits the context over the threads, for the kernel itself splits only heads and queries, and there is one head.

    bfloat16 over longer contexts stays with matrix products: they use the processor's bfloat16 units, the fused kernel
    does not. Over short ones, calling the library that has them costs more than the work; codes are likewise read as
    they are only where there are many.
    """

    name = "cpu"
    serves = (
        f"CPU; float32, bfloat16 and float16 up to {_WIDENED_VALUES} values a sequence, codes up to {_DECODED_VALUES}; "
        "no mask, no softcap, no gradient"
    )

    def why_unavailable(self, device: torch.device) -> str | None:
        """None on a CPU."""
        return None if device.type == "cpu" else f"it takes tensors on a CPU, not on {device.type}"

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for latents that all queries see, else the reason why not."""
        if shape.has_mask or shape.softcap is not None:
            return "it takes neither a mask nor a softcap"
        if not shape.kv_length:
            return "there are no keys"
        if shape.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {shape.dtype}"
        if shape.dtype != torch.float32 or shape.code is not None:
            width = shape.kv_lora_rank + shape.qk_rope_head_dim
            values = width * (shape.kv_length + shape.num_heads * shape.query_length)
            kind, most = (shape.dtype, _WIDENED_VALUES) if shape.code is None else ("codes", _DECODED_VALUES)
            if values > most:
                return f"in {kind} it takes {most} values a sequence, not {values}"
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return "it has no gradient and is not compiled"
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
        """Attends as `AbsorbedBackend.attend` says, with a part of the context for every thread."""
        batch, heads, length, width = query.shape
        own = latents.dense(0, latents.shape[1]) if isinstance(latents, CodedLatents) else latents
        rows, own = query.reshape(batch, 1, heads * length, width).float(), own.float()
        parts = torch.get_num_threads() if own.shape[1] >= _MIN_SPLIT_LENGTH else 1
        if parts == 1:
            context, lse = _attend_whole(rows, own.unsqueeze(1), scale)
        else:
            context, lse = _attend_split(rows, own, scale, parts)
        context = context[..., :kv_lora_rank].to(query.dtype)
        return context.view(batch, heads, length, kv_lora_rank), lse.view(batch, heads, length)


def _attend_whole(rows: torch.Tensor, latents: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows [B, P, m, w]`` to ``latents [B, P, T, w]``: ``[B, P, m, w]`` and the log-sum-exp ``[B, P, m]``."""
    # Keys and values are one tensor, for the kernel takes equal widths only; what is behind the rank is cut off.
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, latents, latents, scale=scale)


def _attend_split(
    rows: torch.Tensor, latents: torch.Tensor, scale: float, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows [B, 1, m, w]`` to ``latents [B, S, w]`` in parts side by side: ``[B, m, w]`` and ``[B, m]``."""
    size = latents.shape[1] // parts
    split = latents[:, : parts * size].unflatten(1, (parts, size))
    context, lse = _attend_whole(rows.expand(-1, parts, -1, -1), split, scale)
    rest = latents[:, parts * size :]
    if rest.shape[1]:
        # Fewer tokens than threads are left: each is a part whose output is itself and whose log-sum-exp its score.
        scores = torch.matmul(rest, rows[:, 0].mT) * scale
        lse = torch.cat((lse, scores), dim=1)
        context = torch.cat((context, rest[:, :, None].expand(-1, -1, rows.shape[2], -1)), dim=1)
    total = torch.logsumexp(lse, dim=1)
    weights = torch.exp(lse - total.unsqueeze(1)).unsqueeze(-1)
    return (context * weights).sum(1), total
