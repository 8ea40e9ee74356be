"""Attention scores, and sums weighted by them, in float32, whatever the factors are stored in."""

from __future__ import annotations

import torch

_STEADY, _MANY_ROWS = 256, 256
"""Tokens, and rows. The library behind 16-bit products on CPUs compiles a kernel for every shape, which takes as long
as reading thousands of tokens, and a cache grows by one token a step: so these products get multiples of so many
tokens. With many rows the product itself takes longer."""


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
    tokens, steady = columns.shape[-1], _steady(rows, rows.shape[-2], columns.shape[-1])
    if steady < tokens:
        rest = product(rows.float(), columns[..., steady:].float())
        return torch.cat((float32_products(rows, columns[..., :steady]), rest), dim=-1) if steady else rest
    rounded = product(rows, columns).detach()
    return rounded.float() + add_product(rounded, rows, columns, beta=-1)


def weighted_sums(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[m, S] x [S, d] -> [m, d]``, weights in float32 or wider, in the dtype of the values or in float32."""
    steady = _steady(values, len(weights), len(values))
    whole = torch.mm(weights[:, :steady].to(values.dtype), values[:steady])
    return whole if steady == len(values) else whole + torch.mm(weights[:, steady:], values[steady:].float())


def _steady(factor: torch.Tensor, rows: int, tokens: int) -> int:
    """How many of some tokens are multiplied as they are stored; the others are copied to float32 before."""
    stays = factor.itemsize > 2 or factor.device.type != "cpu" or rows > _MANY_ROWS
    return tokens if stays or torch.is_grad_enabled() or torch.compiler.is_compiling() else tokens // _STEADY * _STEADY


def capped_and_masked(scores: torch.Tensor, mask: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
    """``softcap * tanh(scores / softcap)`` behind a mask, bool (True attends) or additive, that broadcasts to them.

    Scores are ``[..., n, S]``, floating; so is what is returned.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        return scores
    return torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
