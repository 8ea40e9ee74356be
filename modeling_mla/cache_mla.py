"""The latent cache of a model: one layer object for every layer of the body."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from .cache_layers_mla import LatentLayer, SlidingLatentLayer
from .cache_quantized_mla import QuantizedLatentLayer


class LatentCache(DynamicCache):
    """The cache of a model with Multi-head Latent Attention; `generate` and `forward` make it on their own.

    Full-attention layers grow, sliding-window layers keep their window, layers of any other kind are Transformers'.

    Args:
        config: of the model.
        capacity: tokens to allocate at once where the final length is known.
        offloading: keeps all layers but the current one on the CPU (needs an accelerator with streams).
        quantized: full-attention layers store int8 latents, at about 0.56 of the bytes of bfloat16.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int | None = None,
        offloading: bool = False,
        quantized: bool = False,
    ) -> None:
        layer_types, layer_kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        layers = []
        for layer_type, kwargs in zip(layer_types, layer_kwargs, strict=True):
            if layer_type == "full_attention":
                layers.append((QuantizedLatentLayer if quantized else LatentLayer)(capacity=capacity))
            elif layer_type in ("sliding_attention", "chunked_attention"):
                layers.append(SlidingLatentLayer(**kwargs))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
        super(DynamicCache, self).__init__(layers=layers, offloading=offloading)

    @property
    def nbytes(self) -> int:
        """Bytes that the latent layers occupy, free capacity included."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)


def cached_latents(cache: Cache, layer_idx: int, device: torch.device) -> torch.Tensor | None:
    """``[B, S, r + d_r]``: the one tensor of which a layer's last update returned two views, if there is one."""
    latents = getattr(cache.layers[layer_idx], "visible", None)
    # An offloaded layer has left the device by now.
    return latents if latents is not None and latents.device == device else None
