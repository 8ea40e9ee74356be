"""Multi-head Latent Attention for Hugging Face Transformers.

Importing the package registers its families with AutoConfig and the AutoModel classes. The files are flat and import
each other by ``from .file import name`` alone, for they travel with every checkpoint.
"""

# A line for every family here and below: what a family has is named once, where it is.
from . import (
    cohere_mla,
    gemma2_mla,
    gemma3_mla,
    glm4_mla,
    gpt_neox_mla,
    gpt_oss_mla,
    granite_mla,
    granitemoe_mla,
    llama_mla,
    ministral_mla,
    mistral_mla,
    mixtral_mla,
    olmo2_mla,
    olmo3_mla,
    phi3_mla,
    qwen2_mla,
    qwen2_moe_mla,
    qwen3_mla,
    qwen3_moe_mla,
    smollm3_mla,
    starcoder2_mla,
)
from .attention_mla import MLAttention
from .cache_mla import LatentCache
from .cache_static_mla import StaticLatentCache
from .cohere_mla import *
from .configuration_mla import MLAConfigMixin
from .gemma2_mla import *
from .gemma3_mla import *
from .glm4_mla import *
from .gpt_neox_mla import *
from .gpt_oss_mla import *
from .granite_mla import *
from .granitemoe_mla import *
from .latent_code_mla import LatentCode, PartCode
from .llama_mla import *
from .ministral_mla import *
from .mistral_mla import *
from .mixtral_mla import *
from .native_mla import disable_absorbed_attention, enable_absorbed_attention
from .native_shared_head_mla import disable_shared_head_attention, enable_shared_head_attention
from .olmo2_mla import *
from .olmo3_mla import *
from .phi3_mla import *
from .qwen2_mla import *
from .qwen2_moe_mla import *
from .qwen3_mla import *
from .qwen3_moe_mla import *
from .smollm3_mla import *
from .starcoder2_mla import *

__all__ = [
    "LatentCache",
    "LatentCode",
    "MLAConfigMixin",
    "MLAttention",
    "PartCode",
    "StaticLatentCache",
    "disable_absorbed_attention",
    "disable_shared_head_attention",
    "enable_absorbed_attention",
    "enable_shared_head_attention",
]
__all__ += cohere_mla.__all__
__all__ += gemma2_mla.__all__
__all__ += gemma3_mla.__all__
__all__ += glm4_mla.__all__
__all__ += gpt_neox_mla.__all__
__all__ += gpt_oss_mla.__all__
__all__ += granite_mla.__all__
__all__ += granitemoe_mla.__all__
__all__ += llama_mla.__all__
__all__ += ministral_mla.__all__
__all__ += mistral_mla.__all__
__all__ += mixtral_mla.__all__
__all__ += olmo2_mla.__all__
__all__ += olmo3_mla.__all__
__all__ += phi3_mla.__all__
__all__ += qwen2_mla.__all__
__all__ += qwen2_moe_mla.__all__
__all__ += qwen3_mla.__all__
__all__ += qwen3_moe_mla.__all__
__all__ += smollm3_mla.__all__
__all__ += starcoder2_mla.__all__
