"""Two routes from cached latents to attention output, and the choice between them.

*Expanded* rebuilds keys and values of every head and hands them to the attention function that the user chose.
*Absorbed* attends over the latents themselves. Both give the same result; the cheaper one runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_utils import AttentionInterface

from .backends_mla import AbsorbedShape, select_backend
from .paged_mla import update_paged

if TYPE_CHECKING:
    from .attention_mla import MLAttention

_LATENT_AWARE = ("eager", "sdpa", "flex_attention", "flash_attention_", "paged|", "kernels-community/")
_EXPANDED_ONLY = ("cu_seq_lens_q", "s_aux", "position_bias")
"""Arguments of attention functions that only the expanded route honours."""


def is_latent_aware(attn_implementation: str | None) -> bool:
    """Whether attention under this name takes latents; engines and functions of a user's own get expanded tensors."""
    return attn_implementation is None or attn_implementation.startswith(_LATENT_AWARE)


class MLAttentionInterface(AttentionInterface):
    """Transformers' attention functions, each behind the choice of the route.

    An instance local to the modeling files: other models in the process keep the global functions, and masks are made
    as for the stock names.
    """

    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        function = super().get_interface(attn_implementation, default)
        if not is_latent_aware(attn_implementation):
            return function
        return functools.partial(attend_latents, function, attn_implementation)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over expanded ``[B, H, S, d]`` tensors; also returns the weights ``[B, H, n, S]``."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    # float32 at least, as everywhere in Transformers, but never less than the model's own precision.
    precision = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=precision).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def absorbed_is_cheaper(
    query_length: int, kv_length: int, kv_lora_rank: int, qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int
) -> bool:
    """Compares multiply-adds a head: absorption pays for every query, expansion for every cached token."""
    up_projection = kv_lora_rank * (qk_nope_head_dim + v_head_dim)
    absorbed = query_length * (up_projection + kv_length * (2 * kv_lora_rank + qk_rope_head_dim))
    expanded = kv_length * up_projection + query_length * kv_length * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
    return absorbed < expanded


def _takes_absorbed_route(
    module: MLAttention, query: torch.Tensor, kv_length: int, dropout: float, kwargs: dict
) -> bool:
    if module.route != "auto":
        return module.route == "absorbed"
    if dropout or kwargs.get("output_attentions") or any(kwargs.get(name) is not None for name in _EXPANDED_ONLY):
        return False
    # Derived weights carry no gradient.
    if torch.is_grad_enabled() and (query.requires_grad or module.training):
        return False
    return absorbed_is_cheaper(
        query.shape[2],
        kv_length,
        module.kv_lora_rank,
        module.qk_nope_head_dim,
        module.qk_rope_head_dim,
        module.v_head_dim,
    )


def attend_latents(
    expanded_function: Callable,
    attn_implementation: str,
    module: MLAttention,
    query: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    latents: torch.Tensor | None = None,
    cache: PagedAttentionCache | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over latents by the cheaper route.

    Args:
        expanded_function: Transformers' attention function for expanded tensors.
        attn_implementation: its name, which tells the kind and the alignment of the mask.
        query: ``[B, H, n, qk_nope_head_dim + qk_rope_head_dim]``.
        kv_c, k_pe: ``[B, 1, S, kv_lora_rank]`` and ``[B, 1, S, qk_rope_head_dim]``.
        attention_mask: whatever Transformers makes for the name.
        latents: ``[B, S, r + d_r]``, where ``kv_c`` and ``k_pe`` are views of one tensor.
        cache: the pages of continuous batching, which the attention function has to write and read.

    Returns:
        ``[B, n, H, v_head_dim]``, and the attention weights where the function gives them.
    """
    if cache is not None:
        kv_c, k_pe = update_paged(cache, kv_c, k_pe, module.layer_idx, kwargs)
        # The mask tells the packed sequences apart, and the paged functions would write to the pages again.
        kwargs = {name: value for name, value in kwargs.items() if name not in _EXPANDED_ONLY}
        if attn_implementation == "paged|eager":
            expanded_function = eager_attention_forward
    if _takes_absorbed_route(module, query, kv_c.shape[2], dropout, kwargs):
        latents = fused_latents(kv_c, k_pe) if latents is None else latents
        return attend_absorbed(module, query, latents, attention_mask, attn_implementation, scaling, **kwargs), None
    key, value = module.expand_latents(kv_c, k_pe)
    return expanded_function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def attend_absorbed(
    module: MLAttention,
    query: torch.Tensor,
    latents: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    attn_implementation: str,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> torch.Tensor:
    """Multi-query attention over ``latents [B, S, r + d_r]``; returns ``[B, n, H, v_head_dim]``."""
    length = query.shape[2]
    aligned_to_end = attn_implementation is not None and "flash" in attn_implementation
    if attention_mask is None and not aligned_to_end and is_causal is not False and length > 1:
        # The mask is left out only where queries and keys start together: what follows is an unfilled static cache.
        latents = latents[:, :length]
    mask = dense_mask(attention_mask, length, latents.shape[1], is_causal, sliding_window, aligned_to_end, query.device)

    w_uk, w_uv = module.absorbed_weights(query)
    q_nope, q_rope = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    query = torch.cat((_per_head(q_nope, w_uk), q_rope), dim=-1)
    shape = AbsorbedShape(
        batch=query.shape[0],
        num_heads=query.shape[1],
        query_length=length,
        kv_length=latents.shape[1],
        kv_lora_rank=module.kv_lora_rank,
        qk_rope_head_dim=module.qk_rope_head_dim,
        dtype=query.dtype,
        device=query.device,
        has_mask=mask is not None,
        softcap=softcap,
    )
    backend = select_backend(module.backend, shape)
    context, _ = backend.attend(query, latents, module.kv_lora_rank, scaling, mask, softcap)
    return _per_head(context, w_uv).transpose(1, 2)


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[B, H, n, i] x [H, i, o] -> [B, H, n, o]``, one product a head for the whole batch: a broadcast product would
    copy the weights for every sequence."""
    batch, heads, length, _ = x.shape
    product = torch.bmm(x.transpose(0, 1).reshape(heads, batch * length, -1), weight)
    return product.view(heads, batch, length, -1).transpose(0, 1)


def fused_latents(kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """``[B, S, r + d_r]`` from the pair ``[B, 1, S, r]`` and ``[B, 1, S, d_r]``.

    A view where both are views of one buffer, as `LatentCache` gives them; a copy for any other cache.
    """
    if not torch.compiler.is_compiling() and (
        kv_c.stride() == k_pe.stride()
        and kv_c.stride(-1) == 1
        and k_pe.storage_offset() == kv_c.storage_offset() + kv_c.shape[-1]
        and kv_c.stride(2) >= kv_c.shape[-1] + k_pe.shape[-1]
        and kv_c.untyped_storage().data_ptr() == k_pe.untyped_storage().data_ptr()
    ):
        size = (kv_c.shape[0], kv_c.shape[2], kv_c.shape[-1] + k_pe.shape[-1])
        return kv_c.as_strided(size, (kv_c.stride(0), kv_c.stride(2), 1))
    return torch.cat((kv_c, k_pe), dim=-1).squeeze(1)


def dense_mask(
    attention_mask: torch.Tensor | BlockMask | None,
    query_length: int,
    kv_length: int,
    is_causal: bool | None,
    sliding_window: int | None,
    aligned_to_end: bool,
    device: torch.device,
) -> torch.Tensor | None:
    """One mask, broadcastable to ``[B, H, n, S]``, from the forms that Transformers makes for its functions.

    Args:
        attention_mask: 4-D bool (SDPA) or additive (eager), a `BlockMask` (flex), 2-D padding (flash), or None.
        is_causal: False where attention is bidirectional.
        sliding_window: keys that a query sees, itself included; already in every mask but flash's.
        aligned_to_end: the last query is at the last key (flash), not the first at the first.
    """
    if isinstance(attention_mask, BlockMask):
        batch, heads = attention_mask.shape[:2]
        return create_mask(attention_mask.mask_mod, batch, heads, query_length, kv_length, device=str(device))
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :kv_length]
    mask = None
    window = sliding_window if aligned_to_end else None
    if is_causal is not False and (query_length > 1 or (window is not None and kv_length > window)):
        first = kv_length - query_length if aligned_to_end else 0
        distance = torch.arange(first, first + query_length, device=device)[:, None] - torch.arange(
            kv_length, device=device
        )
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if attention_mask is not None:
        padding = attention_mask[:, None, None, :kv_length].bool()
        mask = padding if mask is None else mask & padding
    return mask
