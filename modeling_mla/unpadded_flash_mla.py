"""FlashAttention-3 and -4 over expanded keys and values without padding the values to the width of the keys.

Transformers pads them for every version, since version 2 takes equal widths only: at DeepSeek's 192 and 128 a copy of
the values and a fifth of the work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .transformers_seams_mla import flash_attention, flash_dtype

_VERSION = re.compile(r"flash[-_]att(?:entio)?n[-_]?(\d)")
_DEEPSEEK = (192, 128)
_MULTIPLE = 8


def without_padding(function: Callable, implementation: str, query: torch.Tensor, value: torch.Tensor) -> Callable:
    """``function``, or what calls the same version of FlashAttention on values as they are, where it takes them.

    Args:
        function: Transformers', for whatever is not served.
        implementation: its name, from which the version follows.
        query: ``[B, H, n, d]``.
        value: ``[B, H, S, d_v]``.
    """
    widths = query.shape[-1], value.shape[-1]
    if widths[0] == widths[1] or not takes_widths(implementation, *widths, _capability(query.device)):
        return function
    # What the kernels' backward passes take beside DeepSeek's widths differs from release to release.
    learns = torch.is_grad_enabled() and (query.requires_grad or value.requires_grad)
    return function if learns and widths != _DEEPSEEK else attend_unpadded


def takes_widths(implementation: str, width: int, value_width: int, capability: tuple[int, int] | None) -> bool:
    """Whether a version of FlashAttention has a kernel for values of another width on a GPU.

    Version 3: ``hopper/flash_api.cpp``, version 4: `_validate_head_dims` in ``flash_attn/cute/interface.py``, both of
    https://github.com/Dao-AILab/flash-attention.
    """
    found = _VERSION.search(implementation)
    if found is None or capability is None or width % _MULTIPLE or value_width % _MULTIPLE:
        return False
    if not 0 < min(width, value_width) <= max(width, value_width) <= 256:
        return False
    version, major = int(found[1]), capability[0]
    if version == 3:
        return major == 9 and (width <= 64 or (128 < width <= 192 and 96 < value_width <= 128))
    if version == 4:
        return major == 9 or (major in (10, 11) and ((width, value_width) == _DEEPSEEK or width <= 128 >= value_width))
    return False


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def attend_unpadded(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """As Transformers' ``flash_attention_forward``, of which it leaves the padding out; ``[B, n, H, d_v]``."""
    known: Any = module
    output = flash_attention(
        *(states.transpose(1, 2) for states in (query, key, value)),
        attention_mask,
        query_length=query.shape[2],
        is_causal=known.is_causal if is_causal is None else is_causal,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        target_dtype=flash_dtype(query, module),
        attn_implementation=known.config._attn_implementation,
        layer_idx=known.layer_idx,
        s_aux=None if s_aux is None else s_aux.to(query.dtype),
        **kwargs,
    )
    return output, None
