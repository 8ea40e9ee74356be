"""The up-projection as two matrices a head, for folding into query and output.

``kv_b_proj`` may be wrapped (LoRA), packed (quantised) or elsewhere (offloaded, sharded). Only a plain layer's weight
is read; of any other the module itself is asked, so that what is absorbed is always what the module would apply.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn

from .transformers_seams_mla import is_torchdynamo_compiling

_ADAPTER_STATE = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
"""What PEFT's layers apply depends on these, beside their tensors."""


class AbsorbedWeights(NamedTuple):
    """``w_uk [H, r, qk_nope_head_dim]`` maps a query into the latent space, ``w_uv [H, v_head_dim, r]`` maps a latent
    context to values (DeepSeek-V2, arXiv 2405.04434, section 2.1.2); both output-major, as `nn.Linear` is."""

    w_uk: torch.Tensor
    w_uv: torch.Tensor


def _is_plain(layer: nn.Module) -> bool:
    """Whether ``layer.weight`` is all that the layer applies."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return False
    weight = layer.weight
    return type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta and weight.is_floating_point()


def _tensor_state(tensor: torch.Tensor) -> tuple:
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def _layer_state(layer: nn.Module) -> tuple | None:
    """Changes whenever what the layer applies may have changed; None where that cannot be told."""
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return None
    try:
        state = tuple(_tensor_state(tensor) for tensor in tensors)
    except RuntimeError:  # a tensor subclass without storage of its own
        return None
    adapters = tuple(repr(getattr(layer, name, None)) for name in _ADAPTER_STATE)
    return id(layer), state, adapters


def is_one_matrix(layer: nn.Module) -> bool:
    """Whether ``layer`` applies the same matrix to every token: no dropout, and no hook that may tell inputs apart (so
    PEFT mixes adapters in a batch) or wants to see them."""
    return not any(
        module._forward_pre_hooks
        or module._forward_hooks
        or (isinstance(module, nn.Dropout) and module.training and module.p)
        for module in layer.modules()
    )


def effective_weight(layer: nn.Module, in_features: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix ``[out, in_features]`` that ``layer`` applies, adapters and dequantisation included."""
    if _is_plain(layer):
        return cast(torch.Tensor, layer.weight).to(dtype)
    return layer(torch.eye(in_features, dtype=dtype, device=device)).mT


class AbsorbedWeightCache:
    """Keeps both matrices contiguous as long as the projection does not change.

    Strided views of ``kv_b_proj.weight`` would do, but a batched product over them is up to ten times slower.
    """

    def __init__(self) -> None:
        self._state: tuple | None = None
        self._weights: AbsorbedWeights | None = None

    def clear(self) -> None:
        self._state = self._weights = None

    def get(
        self, kv_b_proj: nn.Module, kv_lora_rank: int, qk_nope_head_dim: int, v_head_dim: int, like: torch.Tensor
    ) -> AbsorbedWeights:
        """The matrices in ``like``'s dtype and device. The number of heads follows from the projection's output."""
        if is_torchdynamo_compiling():
            return self._derive(kv_b_proj, kv_lora_rank, qk_nope_head_dim, v_head_dim, like)
        state = _layer_state(kv_b_proj)
        if state is not None:
            state = (*state, like.dtype, like.device)
            if state == self._state and self._weights is not None:
                return self._weights
        with torch.no_grad():
            weights = self._derive(kv_b_proj, kv_lora_rank, qk_nope_head_dim, v_head_dim, like)
            weights = AbsorbedWeights(*(weight.contiguous() for weight in weights))
        if state is not None:
            self._state, self._weights = state, weights
        return weights

    @staticmethod
    def _derive(
        kv_b_proj: nn.Module, kv_lora_rank: int, qk_nope_head_dim: int, v_head_dim: int, like: torch.Tensor
    ) -> AbsorbedWeights:
        weight = effective_weight(kv_b_proj, kv_lora_rank, like.dtype, like.device)
        per_head = weight.view(-1, qk_nope_head_dim + v_head_dim, kv_lora_rank)
        w_uk, w_uv = per_head.split([qk_nope_head_dim, v_head_dim], dim=1)
        return AbsorbedWeights(w_uk.mT, w_uv)
