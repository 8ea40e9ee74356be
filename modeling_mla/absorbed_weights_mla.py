"""The up-projection as two matrices a head, for folding into query and output.

Nothing is kept from one call to the next, so what is absorbed is what ``kv_b_proj`` applies at that call, whoever
changed it and by whatever way: fused optimizers, writes to ``weight.data``, inference tensors and flat shards are not
counted by PyTorch. A plain layer's weight is read where it lies, as views, which costs no memory and passes gradients
on, and beside it LoRA's. Any other projection (other adapters, quantised, sharded, offloaded) is asked itself
what it makes of the identity: at every call, as much work as expanding ``kv_lora_rank`` tokens, which the choice of the
route counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .peft_mla import lora_parts, why_adapters_are_no_matrix
from .tensor_parallel_mla import tensor_parallel_group

_CACHED_VALUES = 1 << 20
"""Weights that are read at once, so that a copy, or another order, is read from a processor's cache."""


class LowRank(NamedTuple):
    """What LoRA of rank ``k`` adds to both matrices of `AbsorbedWeights`.

    That is ``scale`` times the products of ``b_uk [H, qk_nope_head_dim, k]`` and ``b_uv [H, v_head_dim, k]`` with
    ``a [k, r]``.
    """

    a: torch.Tensor
    b_uk: torch.Tensor
    b_uv: torch.Tensor
    scale: float


class AbsorbedWeights(NamedTuple):
    """The rows of ``kv_b_proj`` as two matrices a head (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    ``w_uk [H, qk_nope_head_dim, r]`` maps a query into the latent space, ``w_uv [H, v_head_dim, r]`` a latent context
    to values.
    """

    w_uk: torch.Tensor
    w_uv: torch.Tensor
    adapters: tuple[LowRank, ...] = ()

    def latent_query(self, q_nope: torch.Tensor) -> torch.Tensor:
        """Queries ``[B, H, n, qk_nope_head_dim]`` in the latent space, ``[B, H, n, r]``."""
        latent = _per_head(q_nope, self.w_uk)
        for a, b_uk, _, scale in self.adapters:
            # In the adapter's own precision, in which its layer adds it.
            latent = latent + scale * torch.matmul(_per_head(q_nope.to(a.dtype), b_uk), a)
        return latent.to(q_nope.dtype)

    def values(self, context: torch.Tensor) -> torch.Tensor:
        """What a latent context ``[B, H, n, r]`` is as values, ``[B, H, n, v_head_dim]``."""
        value = _per_head(context, self.w_uv.mT)
        for a, _, b_uv, scale in self.adapters:
            value = value + scale * _per_head(torch.matmul(context.to(a.dtype), a.t()), b_uv.mT)
        return value.to(context.dtype)


def derived_rows(layer: nn.Module, in_features: int) -> int | None:
    """Rows of the identity that show the matrix of ``layer``: 0 where its weight is read, None if it has no matrix."""
    if is_plain(layer):
        return 0
    if why_no_matrix(layer) is not None:
        return None
    return in_features if _plain_parts(layer) is None else 0


def is_plain(layer: nn.Module) -> bool:
    """Whether ``layer.weight`` is all that the layer applies."""
    if type(layer) is not nn.Linear or layer.bias is not None or "forward" in layer.__dict__ or _has_hooks(layer):
        return False
    weight = layer.weight
    return type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta and weight.is_floating_point()


def _plain_parts(layer: Any) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, float]]] | None:
    """The weight of a plain layer and no adapters; of LoRA's commonest form, both; None for any other layer."""
    if is_plain(layer):
        return layer.weight, []
    parts = lora_parts(layer)
    if parts is None or not all(is_plain(part) for part in (parts[0], *(ab for *both, _ in parts[1] for ab in both))):
        return None
    base, adapters = parts
    return base.weight, [(a.weight, b.weight, scale) for a, b, scale in adapters]


def why_no_matrix(layer: nn.Module) -> str | None:
    """The reason why no single matrix stands for ``layer``, None where one does."""
    if is_plain(layer):
        return None
    for module in layer.modules():
        if _has_hooks(module):
            return "a hook may tell its inputs apart (so adapters are mixed in a batch) or wants to see them"
        if isinstance(module, nn.Dropout) and module.training and module.p:
            return f"it has dropout of {module.p}, another one for every token"
    if any(name.rpartition(".")[2] == "bias" for name, _ in layer.named_parameters()):
        return "it has a bias"
    return why_adapters_are_no_matrix(layer)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def absorbed_weights(
    kv_b_proj: nn.Module, kv_lora_rank: int, qk_nope_head_dim: int, v_head_dim: int, like: torch.Tensor
) -> AbsorbedWeights:
    """Both matrices, ``[H, d_n, r]`` and ``[H, d_v, r]``, in ``like``'s dtype; H follows from the projection's output.

    Raises:
        ValueError: no single matrix stands for the projection.
    """

    def by_head(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        per_head = rows.view(-1, qk_nope_head_dim + v_head_dim, rows.shape[1])
        uk, uv = per_head.split_with_sizes((qk_nope_head_dim, v_head_dim), dim=1)
        return uk, uv

    if is_plain(kv_b_proj):
        plain: Any = kv_b_proj.weight
        return AbsorbedWeights(*by_head(plain.to(like.dtype)))
    reason = why_no_matrix(kv_b_proj)
    if like.requires_grad and tensor_parallel_group(kv_b_proj) is not None:
        reason = "it is split over processes, and latents would get the gradient of one process's heads"
    if reason is not None:
        raise ValueError(f"kv_b_proj cannot be absorbed: {reason}; set the attention route 'auto' or 'expanded'.")
    weight, adapters = _plain_parts(kv_b_proj) or (_matrix_asked_of(kv_b_proj, kv_lora_rank, like), [])
    return AbsorbedWeights(
        *by_head(weight.to(like.dtype)), tuple(LowRank(a, *by_head(b), scale) for a, b, scale in adapters)
    )


def _matrix_asked_of(layer: nn.Module, in_features: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix ``[out, in_features]`` that ``layer`` applies, adapters and dequantisation included."""
    # Three dimensions, as hidden states have: adapters and packed layers are written for these.
    return layer(torch.eye(in_features, dtype=like.dtype, device=like.device)[None])[0].mT


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[B, H, n, i] x [H, i, o] -> [B, H, n, o]``, one product a head for the whole batch.

    A broadcast product would copy the weights for every sequence.
    """
    batch, heads, length, _ = x.shape
    if batch == 1:
        return _product_by_head(x[0], weight).unsqueeze(0)
    rows = x.transpose(0, 1).reshape(heads, batch * length, -1)
    return _product_by_head(rows, weight).view(heads, batch, length, -1).transpose(0, 1)


def _product_by_head(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[H, m, i] x [H, i, o] -> [H, m, o]``."""
    if rows.device.type != "cpu" or rows.itemsize > 2:
        return _product(rows, weight)
    size = max(_CACHED_VALUES // max(weight.shape[1] * weight.shape[2], 1), 1)
    if size >= len(rows):
        return _half_product(rows, weight)
    parts = zip(rows.split(size), weight.split(size), strict=True)
    return torch.cat([_half_product(*part) for part in parts])


def _half_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`_product` of 16-bit numbers on a CPU, which copies what is not contiguous."""
    # Few processors multiply in float16, and PyTorch's loop for the others is up to thirty times slower than this.
    if rows.dtype == torch.float16:
        return _product(rows.float(), weight.float()).half()
    # Copied as it lies: PyTorch would copy it transposed, which takes five times longer.
    return torch.bmm(rows, weight if weight.stride(-1) == 1 else weight.mT.contiguous().mT)


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[H, m, i] x [H, i, o] -> [H, m, o]``, of a large weight read from the side on which its rows lie.

    From the other side, one token's product with a large weight on a CPU takes twice as long; with a small one it takes
    three quarters of the time, for nothing has to be turned over.
    """
    if weight.stride(-1) == 1 or weight.numel() <= _CACHED_VALUES:
        return torch.bmm(rows, weight)
    return torch.bmm(weight.mT, rows.mT).mT
