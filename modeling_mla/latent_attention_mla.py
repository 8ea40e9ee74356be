"""What both routes read of an attention over cached latents, whoever projects and caches them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from .absorbed_weights_mla import AbsorbedWeights, absorbed_weights
from .attention_functions_mla import is_latent_aware
from .coded_states_mla import CodedStates, decoded


class LatentAttention(nn.Module):
    """What reads cached latents by either route; subclasses project, cache and call the attention function.

    Attributes:
        route: ``"auto"`` picks the cheaper route; ``"absorbed"`` and ``"expanded"`` force one.
        backend: for the absorbed route, ``"auto"`` or a name in `modeling_mla.backends_mla.BACKENDS`.
    """

    route = "auto"
    backend = "auto"
    config: PreTrainedConfig
    kv_b_proj: nn.Module
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    layer_idx: int

    def absorbed_weights(self, like: torch.Tensor) -> AbsorbedWeights:
        """The up-projection as it is applied now, in ``like``'s dtype; see `absorbed_weights_mla`."""
        return absorbed_weights(self.kv_b_proj, self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim, like)

    def expand_kv(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values for the attention function, from latents and shared rotary keys.

        The seam where an engine with kernels of its own takes over (Transformers' contract for MLA models).

        Args:
            kv_c: ``[B, 1, S, kv_lora_rank]``.
            k_pe: ``[B, 1, S, qk_rope_head_dim]``, rotated.

        Returns:
            ``[B, H, S, qk_nope_head_dim + qk_rope_head_dim]`` and ``[B, H, S, v_head_dim]``; the arguments untouched
            where the function in use reads latents.
        """
        if is_latent_aware(self.config._attn_implementation):
            return kv_c, k_pe
        # The projection is named here and a pair written out: engines recognise the method by both.
        key, value = expand_latents(self.kv_b_proj, kv_c, k_pe, self.qk_nope_head_dim, self.v_head_dim)
        return key, value

    def expand_latents(
        self, kv_c: torch.Tensor | CodedStates, k_pe: torch.Tensor | CodedStates
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `expand_kv`, whatever function is in use."""
        return expand_latents(self.kv_b_proj, kv_c, k_pe, self.qk_nope_head_dim, self.v_head_dim)


def expand_latents(
    kv_b_proj: nn.Module,
    kv_c: torch.Tensor | CodedStates,
    k_pe: torch.Tensor | CodedStates,
    qk_nope_head_dim: int,
    v_head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rebuilds every head's keys and values: shapes as in `MLAttention.expand_kv`."""
    kv_c, k_pe = decoded(kv_c), decoded(k_pe)
    batch, _, length, _ = kv_c.shape
    # In the form of hidden states: some adapters and packed layers take nothing else.
    expanded = (
        kv_b_proj(kv_c.squeeze(1).contiguous()).view(batch, length, -1, qk_nope_head_dim + v_head_dim).transpose(1, 2)
    )
    k_nope, value = expanded.split([qk_nope_head_dim, v_head_dim], dim=-1)
    key = torch.cat((k_nope, k_pe.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
    return key, value
