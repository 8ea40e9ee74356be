"""Multi-head Latent Attention for Hugging Face Transformers.

Importing the package registers its families with AutoConfig and the AutoModel classes. The files are flat and import
each other by ``from .file import name`` alone, for they travel with every checkpoint.
"""

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
# What a family has is named once, where it is.
__all__ += sorted(name for name in globals() if "MLA" in name and name not in __all__)
