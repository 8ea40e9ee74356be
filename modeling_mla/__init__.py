"""Multi-head Latent Attention for Hugging Face Transformers.

Importing the package registers its families with AutoConfig and the AutoModel classes. The files are flat and import
each other by ``from .file import name`` alone, for they travel with every checkpoint.
"""

from .attention_mla import MLAttention
from .cache_mla import LatentCache
from .cache_static_mla import StaticLatentCache
from .configuration_mla import MLAConfigMixin
from .latent_code_mla import LatentCode, PartCode
from .llama_mla import (
    LlamaMLAConfig,
    LlamaMLAForCausalLM,
    LlamaMLAForQuestionAnswering,
    LlamaMLAForSequenceClassification,
    LlamaMLAForTokenClassification,
    LlamaMLAModel,
    LlamaMLAPreTrainedModel,
)
from .mistral_mla import (
    MistralMLAConfig,
    MistralMLAForCausalLM,
    MistralMLAForQuestionAnswering,
    MistralMLAForSequenceClassification,
    MistralMLAForTokenClassification,
    MistralMLAModel,
    MistralMLAPreTrainedModel,
)
from .native_mla import disable_absorbed_attention, enable_absorbed_attention
from .native_shared_head_mla import disable_shared_head_attention, enable_shared_head_attention
from .qwen2_mla import (
    Qwen2MLAConfig,
    Qwen2MLAForCausalLM,
    Qwen2MLAForQuestionAnswering,
    Qwen2MLAForSequenceClassification,
    Qwen2MLAForTokenClassification,
    Qwen2MLAModel,
    Qwen2MLAPreTrainedModel,
)
from .qwen3_mla import (
    Qwen3MLAConfig,
    Qwen3MLAForCausalLM,
    Qwen3MLAForQuestionAnswering,
    Qwen3MLAForSequenceClassification,
    Qwen3MLAForTokenClassification,
    Qwen3MLAModel,
    Qwen3MLAPreTrainedModel,
)

__all__ = [
    "LatentCache",
    "LatentCode",
    "LlamaMLAConfig",
    "LlamaMLAForCausalLM",
    "LlamaMLAForQuestionAnswering",
    "LlamaMLAForSequenceClassification",
    "LlamaMLAForTokenClassification",
    "LlamaMLAModel",
    "LlamaMLAPreTrainedModel",
    "MLAConfigMixin",
    "MLAttention",
    "MistralMLAConfig",
    "MistralMLAForCausalLM",
    "MistralMLAForQuestionAnswering",
    "MistralMLAForSequenceClassification",
    "MistralMLAForTokenClassification",
    "MistralMLAModel",
    "MistralMLAPreTrainedModel",
    "PartCode",
    "Qwen2MLAConfig",
    "Qwen2MLAForCausalLM",
    "Qwen2MLAForQuestionAnswering",
    "Qwen2MLAForSequenceClassification",
    "Qwen2MLAForTokenClassification",
    "Qwen2MLAModel",
    "Qwen2MLAPreTrainedModel",
    "Qwen3MLAConfig",
    "Qwen3MLAForCausalLM",
    "Qwen3MLAForQuestionAnswering",
    "Qwen3MLAForSequenceClassification",
    "Qwen3MLAForTokenClassification",
    "Qwen3MLAModel",
    "Qwen3MLAPreTrainedModel",
    "StaticLatentCache",
    "disable_absorbed_attention",
    "disable_shared_head_attention",
    "enable_absorbed_attention",
    "enable_shared_head_attention",
]
