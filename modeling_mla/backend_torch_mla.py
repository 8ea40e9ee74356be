"""Absorbed attention in plain PyTorch: the reference for every kernel, and the fast form on a CPU."""

from __future__ import annotations

import torch


class TorchBackend:
    """Runs everywhere, at every shape and precision."""

    name = "torch"

    def supports(self, shape: object) -> str | None:
        return None

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        kv_lora_rank: int,
        scale: float,
        mask: torch.Tensor | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AbsorbedBackend.attend`. Scores and softmax are float32, or float64 where the query is."""
        batch, heads, length, width = query.shape
        # All heads read one latent head: folding them into the query axis makes one matrix product of each sequence,
        # where expanding the latents to the heads would copy the cache.
        packed = query.reshape(batch, heads * length, width)
        scores = torch.bmm(packed, latents.transpose(1, 2)).view(batch, heads, length, -1)
        scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        lse = torch.logsumexp(scores, dim=-1)
        # A row that sees nothing (left padding) has no softmax; its context is zero.
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        weights = weights.to(query.dtype).view(batch, heads * length, -1)
        context = torch.bmm(weights, latents[..., :kv_lora_rank])
        return context.view(batch, heads, length, kv_lora_rank), lse
