"""Source families by Transformers' ``model_type``.

In: a checkpoint of a family. Out: its layers' attention in the currency of `layers`, its quirks undone; the names and
fields of the converted model. A new family is one file and one entry in `SOURCES`.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..checkpoint.location import Location, locate
from ..errors import SourceError
from .base import SourceModel
from .cohere import CohereSource
from .gemma2 import Gemma2Source
from .gemma3 import Gemma3Source
from .glm4 import Glm4Source
from .gpt_neox import GPTNeoXSource
from .gpt_oss import GptOssSource
from .granite import GraniteSource
from .granitemoe import GraniteMoeSource
from .llama import LlamaSource
from .ministral import MinistralSource
from .mistral import MistralSource
from .mixtral import MixtralSource
from .olmo2 import Olmo2Source
from .olmo3 import Olmo3Source
from .phi3 import Phi3Source
from .qwen2 import Qwen2Source
from .qwen2_moe import Qwen2MoeSource
from .qwen3 import Qwen3Source
from .qwen3_moe import Qwen3MoeSource
from .relatives import nearest_relative
from .smollm3 import SmolLM3Source
from .starcoder2 import Starcoder2Source

_FAMILIES: tuple[type[SourceModel], ...] = (
    CohereSource,
    Gemma2Source,
    Gemma3Source,
    Glm4Source,
    GPTNeoXSource,
    GptOssSource,
    GraniteSource,
    GraniteMoeSource,
    LlamaSource,
    MinistralSource,
    MistralSource,
    MixtralSource,
    Olmo2Source,
    Olmo3Source,
    Phi3Source,
    Qwen2Source,
    Qwen2MoeSource,
    Qwen3Source,
    Qwen3MoeSource,
    SmolLM3Source,
    Starcoder2Source,
)
SOURCES = {source.model_type: source for source in _FAMILIES}


def open_source(model: str) -> SourceModel:
    """The checkpoint that a user named, without its weights yet.

    Args:
        model: a folder, a ``.gguf`` file, a folder with one, or a Hub id.

    Raises:
        SourceError: it cannot be found or read, is MLA already, or is of an unknown family.
    """
    location = locate(model, weights=False)
    return source_of(location, location.config())


def source_of(location: Location, config: PreTrainedConfig) -> SourceModel:
    """The family's view of a checkpoint; raises as `open_source`."""
    if config.model_type in SOURCES:
        return SOURCES[config.model_type](location, config)
    text = config.get_text_config(decoder=True)
    if is_mla(config):
        raise SourceError(
            f"{location.model} is an MLA model already ({config.model_type}, kv_lora_rank "
            f"{text.per_layer_config[0].kv_lora_rank}); give a model with standard attention."
        )
    if hasattr(text, "compress_rates"):
        raise SourceError(
            f"{location.model} is of family {config.model_type!r}: it caches one key/value head that all heads share, "
            "compressed over tokens, which latents would not make smaller; use it as it is."
        )
    if text.model_type in SOURCES:
        raise SourceError(
            f"{location.model} is of family {config.model_type!r}, of which only the language model "
            f"({text.model_type!r}) can be converted; save that by itself and give it."
        )
    raise SourceError(
        f"{location.model} is of family {config.model_type!r}, which cannot be converted; its nearest relative of "
        f"those that can is {nearest_relative(text, SOURCES)!r}, the others are in mla families."
    )


def is_mla(config: PreTrainedConfig) -> bool:
    """By its fields, whatever its name; a source family's configuration may carry them, but reads none."""
    if config.model_type in SOURCES:
        return False
    text = config.get_text_config(decoder=True)
    return getattr(text.per_layer_config[0], "kv_lora_rank", None) is not None


__all__ = ["SOURCES", "SourceModel", "is_mla", "open_source", "source_of"]
