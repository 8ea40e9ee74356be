"""Attention over one shared head that is key and value at once, without a copy of it for every head: DeepSeek V4.

V4 is not MLA: there is no up-projection to absorb. But what it attends to has the form of absorbed attention, one
cached vector a token (or for several tokens) that every head reads as key and as value, and so the same kernels serve
it. Transformers' own function copies that vector to every head at every step, twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from .backend_base_mla import AbsorbedShape
from .backends_mla import checked_backend, select_backend
from .masks_mla import VisibleKeys
from .native_classes_mla import (
    become,
    become_native,
    is_changed,
    native_subclass,
    why_no_attention_function,
)
from .softmax_merge_mla import sink_share
from .transformers_seams_mla import AttentionInterface, with_globals


class SharedHeadInterface(AttentionInterface):
    """Transformers' attention functions, each behind the choice of `attend_shared_head`."""

    @override
    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        return functools.partial(attend_shared_head, super().get_interface(attn_implementation, default))


def attend_shared_head(
    function: Callable,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-query attention to vectors that are key and value.

    Args:
        function: Transformers', for whatever is not of this form, for training and for attention weights.
        module: the attention, with its ``config`` and ``backend``.
        query: ``[B, H, n, d]``.
        key: ``[B, 1, S, d]``.
        value: the same tensor, else ``function`` attends.
        attention_mask: broadcastable to ``[B, H, n, S]``, bool or additive.
        scaling: of the scores.
        dropout: of the attention weights; above 0 ``function`` attends.
        s_aux: ``[H]``, logits of attention sinks.
        **kwargs: passed to ``function``.

    Returns:
        ``[B, n, H, d]``, and the weights where ``function`` gives them.
    """
    wanted = kwargs.get("output_attentions")
    weights_wanted = module.config.output_attentions if wanted is None else wanted
    plain = attention_mask is None and query.shape[2] > 1
    if key is not value or key.shape[1] != 1 or dropout or weights_wanted or plain or torch.is_grad_enabled():
        return function(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, s_aux=s_aux, **kwargs
        )
    visible = VisibleKeys(attention_mask, query.shape[2], key.shape[2], query.device, is_causal=False)
    shape = AbsorbedShape(
        batch=query.shape[0],
        num_heads=query.shape[1],
        query_length=query.shape[2],
        kv_length=key.shape[2],
        kv_lora_rank=key.shape[3],
        qk_rope_head_dim=0,
        dtype=query.dtype,
        device=query.device,
        has_mask=visible.hides_keys,
        visible=visible,
    )
    backend = select_backend(module.backend, shape)
    context, lse = backend.attend(query, key[:, 0], key.shape[3], scaling, visible, None)
    if s_aux is not None:
        context = context * sink_share(lse, s_aux).to(context.dtype)
    return context.transpose(1, 2).contiguous(), None


def enable_shared_head_attention(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Makes a loaded DeepSeek V4 attend to its one key/value head without copying it to every head, in place.

    Args:
        model: with attention modules of one shared head (``kv_proj`` and ``sinks``), also inside wrappers.
        backend: ``"auto"`` or a name in `modeling_mla.backends_mla.BACKENDS`.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no such attention in it, one that is not understood, or the backend cannot be used on
            this machine; nothing has been changed.
    """
    backend = checked_backend(backend)
    attentions: list[Any] = [
        module for module in model.modules() if "kv_proj" in module._modules and "sinks" in module._parameters
    ]
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no attention over one shared head (kv_proj beside sinks).")
    for attention in attentions:
        reason = None if is_changed(attention) else why_no_attention_function(attention)
        if reason is not None:
            raise ValueError(f"{type(attention).__name__} cannot be changed: {reason}")
    for attention in attentions:
        if not is_changed(attention):
            become(attention, _shared_head_attention)
        attention.backend = backend
    return model


def disable_shared_head_attention(model: nn.Module) -> nn.Module:
    """Undoes `enable_shared_head_attention`; returns ``model``."""
    for module in model.modules():
        become_native(module, "backend")
    return model


@functools.cache
def _shared_head_attention(native_class: Any) -> type[nn.Module]:
    forward = with_globals(native_class.forward, ALL_ATTENTION_FUNCTIONS=SharedHeadInterface())
    return native_subclass(_shared_head_attention, (native_class,), forward=forward)


__all__ = ["disable_shared_head_attention", "enable_shared_head_attention"]
