"""The latent cache of a model: one layer object for every layer of the body."""

from __future__ import annotations

import os

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .cache_coded_mla import CodedIndexedLatentLayer, CodedLatentLayer, CodedSlidingLatentLayer
from .cache_file_mla import read_prefix, write_prefix
from .cache_indexed_mla import IndexedLatentLayer
from .cache_layers_mla import LatentLayer, SlidingLatentLayer
from .configuration_mla import layer_code
from .latent_code_mla import EXACT
from .transformers_seams_mla import DYNAMIC_LAYER_TYPE_MAPPING, PagedAttentionCache, get_layer_types_and_kwargs

_LAYERS: dict[str, tuple[type, type]] = {
    "full_attention": (LatentLayer, CodedLatentLayer),
    "indexed_attention": (IndexedLatentLayer, CodedIndexedLatentLayer),
    "sliding_attention": (SlidingLatentLayer, CodedSlidingLatentLayer),
    "chunked_attention": (SlidingLatentLayer, CodedSlidingLatentLayer),
}
"""The plain and the coded layer of every kind of attention."""


class LatentCache(DynamicCache):
    """The cache of a model with Multi-head Latent Attention; `generate` and `forward` make it on their own.

    Full-attention and indexed layers grow, sliding-window layers keep their window, layers of any other kind are
    Transformers'.

    Args:
        config: of the model.
        capacity: tokens to allocate at once where the final length is known.
        offloading: keeps all layers but the current one on the CPU (needs an accelerator with streams).
        latent_bits: bits of a latent's channel, behind a rotation (`uniform_code`): 2, 3, 4, 5, 6 or 8; 16 is uncoded.
            None is what the configuration says.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int | None = None,
        offloading: bool = False,
        latent_bits: int | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        layers = []
        # A model that drafts with its first layers has fewer of them than of layer types.
        for index, (layer_type, kwargs) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=False)):
            if layer_type in _LAYERS:
                plain, coded = _LAYERS[layer_type]
                kwargs = {"capacity": capacity} if layer_type == "full_attention" else kwargs
                code = layer_code(config, index, latent_bits)
                layers.append(plain(**kwargs) if code is None else coded(code, **kwargs))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
        super(DynamicCache, self).__init__(layers=layers, offloading=offloading)

    def skip_padding(self, padding: tuple[int, ...]) -> None:
        """Tells the coded layers how many padded tokens stand before each sequence of a prompt that comes next."""
        for layer in self.layers:
            if hasattr(layer, "skip_padding"):
                layer.skip_padding(padding)

    @property
    def nbytes(self) -> int:
        """Bytes that the latent layers occupy, free capacity included."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)

    def save(self, path: str | os.PathLike, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
        """Writes the cache of ``input_ids`` to a safetensors file, with a fingerprint of model and tokens.

        Args:
            path: of the file; it appears only when it is complete.
            model: that made the cache.
            input_ids: ``[B, S]``, the tokens that the cache holds.

        Raises:
            ValueError: the cache holds another number of sequences or tokens, or has layers that are no `LatentLayer`.
        """
        other = next((layer for layer in self.layers if type(layer) not in (LatentLayer, CodedLatentLayer)), None)
        if other is not None:
            raise ValueError(f"Only full-attention latent layers can be saved, and this cache has a {other!r}.")
        held = tuple(self.layers[0].stored.shape[:2]) if self.layers[0].is_initialized else (0, 0)
        if tuple(input_ids.shape) != held:
            raise ValueError(
                f"input_ids is {tuple(input_ids.shape)}, the cache is {held} (sequences, tokens); pass what it holds."
            )
        write_prefix(path, [layer.saved() for layer in self.layers], model, input_ids)

    @classmethod
    def load(cls, path: str | os.PathLike, model: PreTrainedModel) -> tuple[LatentCache, torch.Tensor]:
        """Reads a saved prefix for ``model``; its layers are coded as they were when it was saved.

        Returns:
            The cache, on the model's device, and the tokens ``[B, S]`` that it holds. Generation continues from ids
            that begin with these: ``model.generate(torch.cat((input_ids, more), -1), past_key_values=cache)``.

        Raises:
            ValueError: the file is no prefix, is damaged, was written by another model or in another dtype.
        """
        cache = cls(config=model.config, latent_bits=EXACT)
        layers, input_ids = read_prefix(path, model, len(cache.layers))
        for index, saved in enumerate(layers):
            layer = LatentLayer() if saved.code is None else CodedLatentLayer(saved.code)
            layer.restore(saved, model.dtype)
            cache.layers[index] = layer
        return cache, input_ids


def cached_latents(cache: Cache | PagedAttentionCache, layer_idx: int, device: torch.device) -> torch.Tensor | None:
    """``[B, S, r + d_r]``: the one tensor of which a layer's last update returned two views, if there is one."""
    if isinstance(cache, PagedAttentionCache):
        return None
    latents = getattr(cache.layers[layer_idx], "visible", None)
    # An offloaded layer has left the device by now.
    return latents if latents is not None and latents.device == device else None
