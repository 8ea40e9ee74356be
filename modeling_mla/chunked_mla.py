"""The expanded route in bounded memory: the context is expanded piece by piece, the pieces merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .coded_states_mla import CodedStates
from .masks_mla import in_graph
from .scores_mla import capped_and_masked, float32_products
from .softmax_merge_mla import finite_lse, merge_attended, sink_share

EXPANDED_LIMIT = 1 << 29
"""Bytes of expanded keys and values above which a long context is taken piece by piece: 512 MiB."""
_PIECE_LIMIT = 1 << 26
"""Elements of one piece's scores, and of its keys and values."""
_QUERY_BLOCK = 1024


def expanded_bytes(query: torch.Tensor, kv_length: int, v_head_dim: int) -> int:
    """Bytes that keys and values of all heads take for the whole context, for a query ``[B, H, n, d_n + d_r]``."""
    batch, heads, _, qk_head_dim = query.shape
    return batch * heads * kv_length * (qk_head_dim + v_head_dim) * query.element_size()


def attend_in_pieces(
    expand: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    kv_c: torch.Tensor | CodedStates,
    k_pe: torch.Tensor | CodedStates,
    mask_of: Callable[[slice, slice], torch.Tensor | None],
    scaling: float,
    softcap: float | None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over expanded keys and values that never exist all at once.

    Args:
        expand: ``(kv_c, k_pe) -> (key, value)`` for some positions.
        query: ``[B, H, n, d_qk]``.
        kv_c: ``[B, 1, S, r]``, which may be coded.
        k_pe: ``[B, 1, S, d_r]``, which may be coded.
        mask_of: the mask between a range of queries and a range of keys, broadcastable to ``[B, H, n, S]``, bool
            (True attends) or additive; None where all is visible.
        scaling: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask.
        s_aux: ``[H]``, logits of attention sinks.

    Returns:
        ``[B, n, H, d_v]``.
    """
    batch, heads, length, _ = query.shape
    precision = torch.promote_types(query.dtype, torch.float32)
    piece = max(_PIECE_LIMIT // (batch * heads * min(length, _QUERY_BLOCK)), 64)
    context: torch.Tensor | None = None
    for start in range(0, kv_c.shape[2], piece):
        keys = slice(start, min(start + piece, kv_c.shape[2]))
        own = (states.narrow(2, start, keys.stop - start) for states in (kv_c, k_pe))
        key, value = expand(*own)
        if context is None:
            context = query.new_zeros(batch, heads, length, value.shape[-1], dtype=precision)
            lse = query.new_full((batch, heads, length), float("-inf"), dtype=precision)
        for first in range(0, length, _QUERY_BLOCK):
            rows = slice(first, min(first + _QUERY_BLOCK, length))
            mask = mask_of(rows, keys)
            if mask is not None and mask.dtype == torch.bool and not in_graph(mask) and not mask.any():
                continue
            scores = float32_products(query[:, :, rows].flatten(0, 1), key.mT.flatten(0, 1)) * scaling
            scores = capped_and_masked(scores.unflatten(0, (batch, heads)), mask, softcap)
            own_lse = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - finite_lse(own_lse).unsqueeze(-1))
            attended = torch.matmul(weights.to(value.dtype), value).to(precision)
            context[:, :, rows], lse[:, :, rows] = merge_attended(
                context[:, :, rows], lse[:, :, rows], attended, own_lse
            )
    assert context is not None
    if s_aux is not None:
        context = context * sink_share(lse, s_aux)
    return context.to(query.dtype).transpose(1, 2)
