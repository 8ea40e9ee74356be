"""The up-projection as two matrices a head, for folding into query and output.

Nothing is kept from one call to the next, so what is absorbed is what ``kv_b_proj`` applies at that call, whoever
changed it and by whatever way: fused optimizers, writes to ``weight.data``, inference tensors and flat shards are not
counted by PyTorch. A plain layer's weight is read where it lies, as views, which costs no memory and passes gradients
on. Any other projection (LoRA, quantised, sharded, offloaded) is asked itself what it makes of the identity: at every
call, as much work as expanding ``kv_lora_rank`` tokens, which the choice of the route counts.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn

from .peft_mla import why_adapters_are_no_matrix
from .tensor_parallel_mla import tensor_parallel_group

_COPIED_VALUES = 1 << 20
"""Weights that are copied at once, so that the copy is read from a processor's cache."""


class AbsorbedWeights(NamedTuple):
    """``w_uk [H, qk_nope_head_dim, r]`` maps a query into the latent space, ``w_uv [H, v_head_dim, r]`` a latent
    context to values (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): the rows of ``kv_b_proj``."""

    w_uk: torch.Tensor
    w_uv: torch.Tensor

    def latent_query(self, q_nope: torch.Tensor) -> torch.Tensor:
        """``[B, H, n, qk_nope_head_dim] -> [B, H, n, r]``."""
        return _per_head(q_nope, self.w_uk)

    def values(self, context: torch.Tensor) -> torch.Tensor:
        """``[B, H, n, r] -> [B, H, n, v_head_dim]``."""
        return _per_head(context, self.w_uv.mT)


def is_plain(layer: nn.Module) -> bool:
    """Whether ``layer.weight`` is all that the layer applies."""
    if type(layer) is not nn.Linear or layer.bias is not None or "forward" in layer.__dict__ or _has_hooks(layer):
        return False
    weight = layer.weight
    return type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta and weight.is_floating_point()


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
    """Both matrices in ``like``'s dtype; the number of heads follows from the projection's output.

    Raises:
        ValueError: no single matrix stands for the projection.
    """
    weight = _effective_weight(kv_b_proj, kv_lora_rank, like)
    per_head = weight.view(-1, qk_nope_head_dim + v_head_dim, kv_lora_rank)
    return AbsorbedWeights(*per_head.split([qk_nope_head_dim, v_head_dim], dim=1))


def _effective_weight(layer: nn.Module, in_features: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix ``[out, in_features]`` that ``layer`` applies, adapters and dequantisation included."""
    if is_plain(layer):
        return cast(torch.Tensor, layer.weight).to(like.dtype)
    reason = why_no_matrix(layer)
    if like.requires_grad and tensor_parallel_group(layer) is not None:
        reason = "it is split over processes, and latents would get the gradient of one process's heads"
    if reason is not None:
        raise ValueError(f"kv_b_proj cannot be absorbed: {reason}; set the attention route 'auto' or 'expanded'.")
    # Three dimensions, as hidden states have: adapters and packed layers are written for these.
    return layer(torch.eye(in_features, dtype=like.dtype, device=like.device)[None])[0].mT.to(like.dtype)


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[B, H, n, i] x [H, i, o] -> [B, H, n, o]``, one product a head for the whole batch: a broadcast product would
    copy the weights for every sequence."""
    batch, heads, length, _ = x.shape
    rows = x.transpose(0, 1).reshape(heads, batch * length, -1)
    if x.device.type == "cpu" and x.itemsize == 2:
        size = max(_COPIED_VALUES // max(weight[0].numel(), 1), 1)
        parts = zip(rows.split(size), weight.split(size), strict=True)
        product = torch.cat([_half_product(*part) for part in parts])
    else:
        product = _product(rows, weight)
    return product.reshape(heads, batch, length, -1).transpose(0, 1)


def _half_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`_product` of 16-bit numbers on a CPU, which copies what is not contiguous."""
    # Few processors multiply in float16, and PyTorch's loop for the others is up to thirty times slower than this.
    if rows.dtype == torch.float16:
        return _product(rows.float(), weight.float()).half()
    # Copied as it lies: PyTorch would copy it transposed, which takes five times longer.
    return torch.bmm(rows, weight if weight.stride(-1) == 1 else weight.mT.contiguous().mT)


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[H, m, i] x [H, i, o]``, read from the side on which the weight's rows lie: from the other, one token's
    product on a CPU is up to five times slower."""
    return torch.bmm(rows, weight) if weight.stride(-1) == 1 else torch.bmm(weight.mT, rows.mT).mT
