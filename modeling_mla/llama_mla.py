"""Llama with Multi-head Latent Attention: Llama 2 and 3.x, SmolLM2, TinyLlama, Yi."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, LlamaConfig
from transformers.models.llama import modeling_llama as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class LlamaMLAConfig(MLAConfigMixin, LlamaConfig):
    """`LlamaConfig` with the fields of `MLAConfigMixin`."""

    model_type = "llama_mla"
    base_model_tp_plan = mla_tp_plan(LlamaConfig.base_model_tp_plan)


class LlamaMLADecoderLayer(body.LlamaDecoderLayer):
    """Llama's decoder layer with `MLAttention` in the place of its attention."""

    __init__ = built_with(body.LlamaDecoderLayer, LlamaAttention=MLAttention)


class LlamaMLAPreTrainedModel(MLAPreTrainedMixin, body.LlamaPreTrainedModel):
    """The base of Llama's models with MLA: their configuration, and what their outputs are recorded from."""

    config: LlamaMLAConfig
    config_class = LlamaMLAConfig
    _no_split_modules = ["LlamaMLADecoderLayer"]
    _can_record_outputs = {"hidden_states": LlamaMLADecoderLayer, "attentions": MLAttention}


class LlamaMLAModel(LlamaMLAPreTrainedModel, body.LlamaModel):
    """Llama's decoder with `MLAttention`; it makes a `LatentCache` where it is given no cache."""

    __init__ = built_with(
        body.LlamaModel, LlamaDecoderLayer=LlamaMLADecoderLayer, LlamaRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.LlamaModel.forward)


class LlamaMLAForCausalLM(LlamaMLAPreTrainedModel, body.LlamaForCausalLM, GenerationMixin):
    """Llama's language model on top of `LlamaMLAModel`."""

    __init__ = built_with(body.LlamaForCausalLM, LlamaModel=LlamaMLAModel)


_heads = generic_heads(LlamaMLAPreTrainedModel)
LlamaMLAForSequenceClassification, LlamaMLAForTokenClassification, LlamaMLAForQuestionAnswering = _heads

register_family(LlamaMLAConfig, LlamaMLAModel, LlamaMLAForCausalLM, *_heads)

__all__ = [
    "LlamaMLAConfig",
    "LlamaMLAForCausalLM",
    "LlamaMLAForQuestionAnswering",
    "LlamaMLAForSequenceClassification",
    "LlamaMLAForTokenClassification",
    "LlamaMLAModel",
    "LlamaMLAPreTrainedModel",
]
