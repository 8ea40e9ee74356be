"""Attention scores in float32, whatever the factors are stored in."""

from __future__ import annotations

import torch


def float32_products(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``[n, d] x [d, S] -> [n, S]`` or ``[B, n, d] x [B, d, S] -> [B, n, S]``, in float32 or, as the factors, wider.

    PyTorch sums products of 16-bit numbers in float32, and then rounds the sum to 16 bits: an error of a percent behind
    a softmax. CUDA's products can be told not to. Elsewhere, and where gradients are wanted, what the rounding took is
    asked for in a second product, whose sum starts from what is known.
    """
    product, add_product = (torch.mm, torch.addmm) if rows.dim() == 2 else (torch.bmm, torch.baddbmm)
    if rows.itemsize > 2:
        return product(rows, columns)
    if rows.is_cuda and not torch.is_grad_enabled():
        return product(rows, columns, out_dtype=torch.float32)
    rounded = product(rows, columns).detach()
    return rounded.float() + add_product(rounded, rows, columns, beta=-1)


def capped_and_masked(scores: torch.Tensor, mask: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
    """``softcap * tanh(scores / softcap)`` behind a mask, bool (True attends) or additive, that broadcasts to them.

    Scores are ``[..., n, S]``, floating; so is what is returned.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        return scores
    return torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
