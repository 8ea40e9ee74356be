"""Absorbed attention by PyTorch's fused kernel for CPUs: float32 decode over long contexts, one pass over the cache."""

from __future__ import annotations

import torch

from .backend_base_mla import AbsorbedShape
from .latent_tiles_mla import CodedLatents
from .masks_mla import VisibleKeys

_MIN_LENGTH = 512
"""Below this context two matrix products are as fast."""


class CpuBackend:
    """Splits the context over the threads, for the kernel itself splits only heads and queries, and there is one head.

    bfloat16 stays with matrix products: they use the processor's bfloat16 units, the fused kernel does not.
    """

    name = "cpu"
    serves = f"CPU; float32; {_MIN_LENGTH} tokens and more, no mask, no softcap, no codes, no gradient"

    def why_unavailable(self, device: torch.device) -> str | None:
        """None on a CPU."""
        return None if device.type == "cpu" else f"it takes tensors on a CPU, not on {device.type}"

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for plain float32 over a long context, else the reason why not."""
        if shape.dtype != torch.float32:
            return f"it takes float32, not {shape.dtype}"
        if shape.has_mask or shape.softcap is not None:
            return "it takes neither a mask nor a softcap"
        if shape.code is not None:
            return "it takes no coded latents"
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return "it has no gradient and is not compiled"
        if shape.kv_length < _MIN_LENGTH:
            return f"a context of {shape.kv_length} is below {_MIN_LENGTH}"
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
        """Attends to plain latents, as `AbsorbedBackend.attend` says, with a part of the context for every thread."""
        assert isinstance(latents, torch.Tensor)
        batch, heads, length, width = query.shape
        parts = torch.get_num_threads()
        size = latents.shape[1] // parts
        rows = query.reshape(batch, 1, heads * length, width)
        split = latents[:, : parts * size].unflatten(1, (parts, size))
        # Keys and values are one tensor, for the kernel takes equal widths only; what is behind the rank is cut off.
        context, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows.expand(-1, parts, -1, -1), split, split, scale=scale
        )
        context = context[..., :kv_lora_rank]
        rest = latents[:, parts * size :]
        if rest.shape[1]:
            # Fewer tokens than threads are left: each is a part whose output is itself and whose log-sum-exp its score.
            scores = torch.matmul(rest, rows[:, 0].mT) * scale
            lse = torch.cat((lse, scores), dim=1)
            own = rest[:, :, None, :kv_lora_rank].expand(-1, -1, heads * length, -1)
            context = torch.cat((context, own), dim=1)
        total = torch.logsumexp(lse, dim=1)
        weights = torch.exp(lse - total.unsqueeze(1)).unsqueeze(-1)
        context = (context * weights).sum(1)
        return context.view(batch, heads, length, kv_lora_rank), total.view(batch, heads, length)
