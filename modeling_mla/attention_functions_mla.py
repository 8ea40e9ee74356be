"""Transformers' attention functions by their names, and the plain one that every body defines for itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_LATENT_AWARE = ("eager", "sdpa", "flex_attention", "flash_attention_", "paged|", "kernels-community/")


def is_latent_aware(attn_implementation: str | None) -> bool:
    """Whether attention under this name takes latents; engines and functions of a user's own get expanded tensors."""
    return attn_implementation is None or attn_implementation.startswith(_LATENT_AWARE)


def is_flash(attn_implementation: str | None) -> bool:
    """Whether Transformers treats a name as flash attention: 2-D masks, packed rows by their positions."""
    return attn_implementation is not None and "flash" in attn_implementation


def with_equal_widths(function: Callable) -> Callable:
    """An attention function that is given heads of one width, the narrower ones filled up with zeros.

    PyTorch's fused attention on a CPU knows no other. What it does instead holds the attention weights of all heads,
    and keeps those of every layer for the gradient: at thousands of tokens a prompt takes several times as long, and
    learning many times the memory of the model. Zeros change no score, for the scale is given, and those of values are
    cut off again.
    """

    @functools.wraps(function)
    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        width, value_width = key.shape[-1], value.shape[-1]
        fill = nn.functional.pad
        query, key = (fill(states, (0, max(0, value_width - width))) for states in (query, key))
        value = fill(value, (0, max(0, width - value_width)))
        output, weights = function(module, query, key, value, *args, **kwargs)
        return output[..., :value_width], weights

    return attend


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over expanded ``[B, H, S, d]`` tensors; also returns the weights ``[B, H, n, S]``.

    ``s_aux [H]`` are attention sinks, one logit a head that takes its share of the softmax and has no value.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    # float32 at least, as everywhere in Transformers, but never less than the model's own precision.
    precision = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=precision).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
