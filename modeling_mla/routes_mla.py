"""Two routes from cached latents to attention output, and the choice between them.

*Expanded* rebuilds keys and values of every head and hands them to the attention function that the user chose.
*Absorbed* attends over the latents themselves. Both give the same result; the cheaper one runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask
from typing_extensions import override

from .absorbed_weights_mla import derived_rows
from .attention_functions_mla import eager_attention_forward, is_flash, is_latent_aware, with_equal_widths
from .backend_base_mla import AbsorbedShape
from .backends_mla import select_backend
from .chunked_mla import EXPANDED_LIMIT, attend_in_pieces, expanded_bytes
from .coded_states_mla import CodedStates
from .latent_attention_mla import LatentAttention
from .latent_tiles_mla import CodedLatents, narrowed
from .masks_mla import VisibleKeys
from .peft_mla import refuse_adapters_by_position
from .softmax_merge_mla import sink_share
from .transformers_seams_mla import AttentionInterface, PagedAttentionCache, tells_rows_apart
from .unpadded_flash_mla import without_padding

_EXPANDED_ONLY = ("cu_seq_lens_q", "indices", "position_bias")
"""Arguments of attention functions that only the expanded route honours."""


class MLAttentionInterface(AttentionInterface):
    """Transformers' attention functions, each behind the choice of the route.

    An instance local to the modeling files: other models in the process keep the global functions, and masks are made
    as for the stock names.
    """

    @override
    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        function = super().get_interface(attn_implementation, default)
        if not is_latent_aware(attn_implementation):
            return function
        return functools.partial(attend_latents, function, attn_implementation)


def absorbed_is_cheaper(
    query_length: int,
    kv_length: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    derived_rows: float = 0.0,
) -> bool:
    """Compares multiply-adds a head and sequence: absorption pays for every query, expansion for every cached token.

    ``derived_rows`` are tokens that a projection has to expand besides, to show the matrix that it applies.
    """
    up_projection = kv_lora_rank * (qk_nope_head_dim + v_head_dim)
    absorbed = (derived_rows + query_length) * up_projection
    absorbed += query_length * kv_length * (2 * kv_lora_rank + qk_rope_head_dim)
    expanded = kv_length * up_projection + query_length * kv_length * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
    return absorbed < expanded


def why_expand(
    module: LatentAttention, query: torch.Tensor, attn_implementation: str | None, dropout: float, kwargs: dict
) -> str | None:
    """The reason why only the attention function itself, over expanded keys and values, serves a call; else None.

    The one place where this is decided: absorbed attention and expansion in pieces both ask it, for both honour the
    mask, the window, a softcap, sinks and causality, and nothing else that a function may be given. ``query`` is
    ``[B, H, n, d_n + d_r]``, ``kwargs`` what the function would be given besides.
    """
    if dropout:
        return f"dropout is {dropout}"
    wanted = kwargs.get("output_attentions")
    if module.config.output_attentions if wanted is None else wanted:
        return "attention weights are wanted"
    for name in _EXPANDED_ONLY:
        if kwargs.get(name) is not None:
            return f"{name} is given"
    # Other functions get a mask that was made of the positions.
    if is_flash(attn_implementation) and tells_rows_apart(kwargs.get("position_ids"), query.shape[0]):
        return "the positions start again within a row, which holds several packed sequences"
    return None


def _takes_absorbed_route(module: LatentAttention, query: torch.Tensor, kv_length: int, reason: str | None) -> bool:
    if module.route != "auto":
        if module.route == "absorbed" and reason is not None:
            raise ValueError(f"The absorbed route was asked for, but {reason}; call model.set_attention_route('auto').")
        return module.route == "absorbed"
    if reason is not None:
        return False
    # A backend keeps its scores for the backward pass, which the fused functions of the expanded route do not.
    if torch.is_grad_enabled():
        projection_learns = any(parameter.requires_grad for parameter in module.kv_b_proj.parameters())
        if query.requires_grad or projection_learns or module.training:
            return False
    rows = derived_rows(module.kv_b_proj, module.kv_lora_rank)
    if rows is None:
        return False
    return absorbed_is_cheaper(
        query.shape[2],
        kv_length,
        module.kv_lora_rank,
        module.qk_nope_head_dim,
        module.qk_rope_head_dim,
        module.v_head_dim,
        derived_rows=rows / query.shape[0],
    )


def _must_expand_in_pieces(
    module: LatentAttention, query: torch.Tensor, kv_length: int, reason: str | None, kwargs: dict
) -> bool:
    if reason is not None or (torch.is_grad_enabled() and query.requires_grad):
        return False
    return expanded_bytes(query, kv_length, module.v_head_dim) > EXPANDED_LIMIT


def attend_latents(
    expanded_function: Callable,
    attn_implementation: str,
    module: LatentAttention,
    query: torch.Tensor,
    kv_c: torch.Tensor | CodedStates,
    k_pe: torch.Tensor | CodedStates,
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
        module: the attention that calls; its ``route`` and ``backend`` may force the choice.
        query: ``[B, H, n, qk_nope_head_dim + qk_rope_head_dim]``.
        kv_c: ``[B, 1, S, kv_lora_rank]``, which may be coded.
        k_pe: ``[B, 1, S, qk_rope_head_dim]``, which may be coded.
        attention_mask: whatever Transformers makes for the name.
        dropout: share of the attention weights that is dropped; only the expanded route does it.
        scaling: of the scores.
        latents: ``[B, S, r + d_r]``, where ``kv_c`` and ``k_pe`` are views of one tensor.
        cache: the pages of continuous batching, where the release leaves them to the attention function (before 5.24).
        **kwargs: further arguments of the attention function; some force the expanded route, see `why_expand`.

    Returns:
        ``[B, n, H, v_head_dim]``, and the attention weights where the function gives them.
    """
    if cache is not None:
        kv_c, k_pe = cache.update(kv_c, k_pe, module.layer_idx, kwargs=kwargs)
    if attn_implementation == "paged|eager":
        # The stock function may want the pages themselves.
        expanded_function = eager_attention_forward
    if kv_c.shape[2] != query.shape[2]:
        refuse_adapters_by_position(module.kv_b_proj)
    reason = why_expand(module, query, attn_implementation, dropout, kwargs)
    if _takes_absorbed_route(module, query, kv_c.shape[2], reason):
        read = fused_latents(kv_c, k_pe) if latents is None else latents
        visible = _visible_keys(query, kv_c, attention_mask, attn_implementation, kwargs)
        softcap, s_aux = kwargs.get("softcap"), kwargs.get("s_aux")
        return attend_absorbed(module, query, read, visible, scaling, softcap, s_aux), None
    if _must_expand_in_pieces(module, query, kv_c.shape[2], reason, kwargs):
        visible = _visible_keys(query, kv_c, attention_mask, attn_implementation, kwargs)
        kv_c, k_pe = (states.narrow(2, 0, visible.keys_in_use) for states in (kv_c, k_pe))
        softcap, s_aux = kwargs.get("softcap"), kwargs.get("s_aux")
        return attend_in_pieces(module.expand_latents, query, kv_c, k_pe, visible.block, scaling, softcap, s_aux), None
    key, value = module.expand_latents(kv_c, k_pe)
    if is_flash(attn_implementation):
        expanded_function = without_padding(expanded_function, attn_implementation, query, value)
    elif attn_implementation == "sdpa" and query.device.type == "cpu":
        expanded_function = with_equal_widths(expanded_function)
    return expanded_function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _visible_keys(
    query: torch.Tensor,
    kv_c: torch.Tensor | CodedStates,
    attention_mask: torch.Tensor | BlockMask | None,
    attn_implementation: str,
    kwargs: dict,
) -> VisibleKeys:
    return VisibleKeys(
        attention_mask,
        query_length=query.shape[2],
        kv_length=kv_c.shape[2],
        device=query.device,
        is_causal=kwargs.get("is_causal") is not False,
        sliding_window=kwargs.get("sliding_window"),
        aligned_to_end=is_flash(attn_implementation),
    )


def attend_absorbed(
    module: LatentAttention,
    query: torch.Tensor,
    latents: torch.Tensor | CodedLatents,
    visible: VisibleKeys,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-query attention over ``latents [B, S, r + d_r]``; returns ``[B, n, H, v_head_dim]``.

    ``s_aux [H]`` are attention sinks, one logit a head that takes its share of the softmax and has no value.
    """
    if visible.keys_in_use != latents.shape[1]:
        latents = narrowed(latents, visible.keys_in_use)
    weights = module.absorbed_weights(query)
    q_nope, q_rope = query.split_with_sizes([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    query = torch.cat((weights.latent_query(q_nope), q_rope), dim=-1)
    coded = latents if isinstance(latents, CodedLatents) else None
    query = query if coded is None else coded.rotated_query(query)
    shape = AbsorbedShape(
        batch=query.shape[0],
        num_heads=query.shape[1],
        query_length=query.shape[2],
        kv_length=latents.shape[1],
        kv_lora_rank=module.kv_lora_rank,
        qk_rope_head_dim=module.qk_rope_head_dim,
        dtype=query.dtype,
        device=query.device,
        has_mask=visible.hides_keys,
        softcap=softcap,
        code=None if coded is None else coded.code,
        visible=visible,
    )
    backend = select_backend(module.backend, shape)
    context, lse = backend.attend(query, latents, module.kv_lora_rank, scaling, visible, softcap)
    context = context if coded is None else coded.context(context)
    if s_aux is not None:
        context = context * sink_share(lse, s_aux).to(context.dtype)
    return weights.values(context).transpose(1, 2)


def fused_latents(kv_c: torch.Tensor | CodedStates, k_pe: torch.Tensor | CodedStates) -> torch.Tensor | CodedLatents:
    """``[B, S, r + d_r]`` from the pair ``[B, 1, S, r]`` and ``[B, 1, S, d_r]``.

    A view where both are views of one buffer, as `LatentCache` gives them; a copy for any other cache.
    """
    if isinstance(kv_c, CodedStates) and isinstance(k_pe, CodedStates):
        return CodedLatents(kv_c, k_pe)
    assert isinstance(kv_c, torch.Tensor)
    assert isinstance(k_pe, torch.Tensor)
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
