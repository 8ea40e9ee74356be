"""Multi-head Latent Attention for Hugging Face Transformers.

Importing the package registers its families with AutoConfig and the AutoModel classes. The files are flat and import
each other by ``from .file import name`` alone, for they travel with every checkpoint.
"""

from .attention_mla import MLAttention
from .cache_mla import LatentCache
from .cache_static_mla import StaticLatentCache
from .configuration_mla import MLAConfigMixin
from .llama_mla import (
    LlamaMLAConfig,
    LlamaMLAForCausalLM,
    LlamaMLAForQuestionAnswering,
    LlamaMLAForSequenceClassification,
    LlamaMLAForTokenClassification,
    LlamaMLAModel,
    LlamaMLAPreTrainedModel,
)

__all__ = [
    "LatentCache",
    "LlamaMLAConfig",
    "LlamaMLAForCausalLM",
    "LlamaMLAForQuestionAnswering",
    "LlamaMLAForSequenceClassification",
    "LlamaMLAForTokenClassification",
    "LlamaMLAModel",
    "LlamaMLAPreTrainedModel",
    "MLAConfigMixin",
    "MLAttention",
    "StaticLatentCache",
]
