"""Multi-head Latent Attention for Hugging Face Transformers.

Importing the package registers its families with AutoConfig and the AutoModel classes. The files are flat and import
each other by ``from .file import name`` alone, for they travel with every checkpoint.
"""

from .attention_mla import MLAttention
from .cache_mla import LatentCache
from .cache_static_mla import StaticLatentCache
from .cohere_mla import (
    CohereMLAConfig,
    CohereMLAForCausalLM,
    CohereMLAForQuestionAnswering,
    CohereMLAForSequenceClassification,
    CohereMLAForTokenClassification,
    CohereMLAModel,
    CohereMLAPreTrainedModel,
)
from .configuration_mla import MLAConfigMixin
from .gemma2_mla import (
    Gemma2MLAConfig,
    Gemma2MLAForCausalLM,
    Gemma2MLAForQuestionAnswering,
    Gemma2MLAForSequenceClassification,
    Gemma2MLAForTokenClassification,
    Gemma2MLAModel,
    Gemma2MLAPreTrainedModel,
)
from .gemma3_mla import (
    Gemma3MLAConfig,
    Gemma3MLAForCausalLM,
    Gemma3MLAForQuestionAnswering,
    Gemma3MLAForSequenceClassification,
    Gemma3MLAForTokenClassification,
    Gemma3MLAModel,
    Gemma3MLAPreTrainedModel,
)
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
from .olmo2_mla import (
    Olmo2MLAConfig,
    Olmo2MLAForCausalLM,
    Olmo2MLAForQuestionAnswering,
    Olmo2MLAForSequenceClassification,
    Olmo2MLAForTokenClassification,
    Olmo2MLAModel,
    Olmo2MLAPreTrainedModel,
)
from .olmo3_mla import (
    Olmo3MLAConfig,
    Olmo3MLAForCausalLM,
    Olmo3MLAForQuestionAnswering,
    Olmo3MLAForSequenceClassification,
    Olmo3MLAForTokenClassification,
    Olmo3MLAModel,
    Olmo3MLAPreTrainedModel,
)
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
    "CohereMLAConfig",
    "CohereMLAForCausalLM",
    "CohereMLAForQuestionAnswering",
    "CohereMLAForSequenceClassification",
    "CohereMLAForTokenClassification",
    "CohereMLAModel",
    "CohereMLAPreTrainedModel",
    "Gemma2MLAConfig",
    "Gemma2MLAForCausalLM",
    "Gemma2MLAForQuestionAnswering",
    "Gemma2MLAForSequenceClassification",
    "Gemma2MLAForTokenClassification",
    "Gemma2MLAModel",
    "Gemma2MLAPreTrainedModel",
    "Gemma3MLAConfig",
    "Gemma3MLAForCausalLM",
    "Gemma3MLAForQuestionAnswering",
    "Gemma3MLAForSequenceClassification",
    "Gemma3MLAForTokenClassification",
    "Gemma3MLAModel",
    "Gemma3MLAPreTrainedModel",
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
    "MistralMLAConfig",
    "MistralMLAForCausalLM",
    "MistralMLAForQuestionAnswering",
    "MistralMLAForSequenceClassification",
    "MistralMLAForTokenClassification",
    "MistralMLAModel",
    "MistralMLAPreTrainedModel",
    "Olmo2MLAConfig",
    "Olmo2MLAForCausalLM",
    "Olmo2MLAForQuestionAnswering",
    "Olmo2MLAForSequenceClassification",
    "Olmo2MLAForTokenClassification",
    "Olmo2MLAModel",
    "Olmo2MLAPreTrainedModel",
    "Olmo3MLAConfig",
    "Olmo3MLAForCausalLM",
    "Olmo3MLAForQuestionAnswering",
    "Olmo3MLAForSequenceClassification",
    "Olmo3MLAForTokenClassification",
    "Olmo3MLAModel",
    "Olmo3MLAPreTrainedModel",
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
