"""The latent cache of fixed size, for `torch.compile`, CUDA graphs and `torch.export`."""

from __future__ import annotations

from transformers import PreTrainedConfig, StaticCache

from .cache_static_layers_mla import CodedStaticLatentLayer, StaticLatentLayer
from .configuration_mla import latent_widths, layer_code
from .transformers_seams_mla import STATIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs


class StaticLatentCache(StaticCache):
    """`StaticCache` over latents; what `generate(cache_implementation="static")` makes.

    Args:
        config: of the model.
        max_cache_len: tokens that every full-attention layer holds.
        offloading: keeps all layers but the current one on the CPU (needs an accelerator with streams).
        latent_bits: as of `LatentCache`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        offloading: bool = False,
        latent_bits: int | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        layers = []
        for index, (layer_type, kwargs) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=False)):
            if layer_type == "full_attention":
                widths, code = latent_widths(config, index), layer_code(config, index, latent_bits)
                if code is None:
                    layer = StaticLatentLayer(max_cache_len, *widths)
                else:
                    layer = CodedStaticLatentLayer(code, max_cache_len, *widths)
            else:
                layer = STATIC_LAYER_TYPE_MAPPING[layer_type](max_cache_len=max_cache_len, **kwargs)
            layers.append(layer)
        super(StaticCache, self).__init__(layers=layers, offloading=offloading)

    def skip_padding(self, padding: tuple[int, ...]) -> None:
        """Tells the coded layers how many padded tokens stand before each sequence of a prompt that comes next."""
        for layer in self.layers:
            if hasattr(layer, "skip_padding"):
                layer.skip_padding(padding)

    @property
    def nbytes(self) -> int:
        """Bytes that the latent layers occupy."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)
