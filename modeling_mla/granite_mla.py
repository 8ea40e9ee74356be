"""Granite with Multi-head Latent Attention: the body multiplies embeddings, what a block adds, and logits."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, GraniteConfig
from transformers.models.granite import modeling_granite as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class GraniteMLAConfig(MLAConfigMixin, GraniteConfig):
    """`GraniteConfig` with the fields of `MLAConfigMixin`."""

    model_type = "granite_mla"
    base_model_tp_plan = mla_tp_plan(GraniteConfig.base_model_tp_plan)

    def __post_init__(self, **kwargs) -> None:
        if self.softmax_scale is None:
            self.softmax_scale = self.attention_multiplier
        super().__post_init__(**kwargs)


class GraniteMLADecoderLayer(body.GraniteDecoderLayer):
    """Granite's decoder layer with `MLAttention`, whose output is multiplied before it is added."""

    __init__ = built_with(body.GraniteDecoderLayer, GraniteAttention=MLAttention)


class GraniteMLAPreTrainedModel(MLAPreTrainedMixin, body.GranitePreTrainedModel):
    """The base of Granite's models with MLA: their configuration, and what their outputs are recorded from."""

    config: GraniteMLAConfig
    config_class = GraniteMLAConfig
    _no_split_modules = ["GraniteMLADecoderLayer"]
    _can_record_outputs = {"hidden_states": GraniteMLADecoderLayer, "attentions": MLAttention}


class GraniteMLAModel(GraniteMLAPreTrainedModel, body.GraniteModel):
    """Granite's decoder with `MLAttention`; it multiplies the embeddings that enter it."""

    __init__ = built_with(
        body.GraniteModel, GraniteDecoderLayer=GraniteMLADecoderLayer, GraniteRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.GraniteModel.forward)


class GraniteMLAForCausalLM(GraniteMLAPreTrainedModel, body.GraniteForCausalLM, GenerationMixin):
    """Granite's language model on top of `GraniteMLAModel`; it divides its logits."""

    __init__ = built_with(body.GraniteForCausalLM, GraniteModel=GraniteMLAModel)


_heads = generic_heads(GraniteMLAPreTrainedModel)
GraniteMLAForSequenceClassification, GraniteMLAForTokenClassification, GraniteMLAForQuestionAnswering = _heads

register_family(GraniteMLAConfig, GraniteMLAModel, GraniteMLAForCausalLM, *_heads)

__all__ = [
    "GraniteMLAConfig",
    "GraniteMLAForCausalLM",
    "GraniteMLAForQuestionAnswering",
    "GraniteMLAForSequenceClassification",
    "GraniteMLAForTokenClassification",
    "GraniteMLAModel",
    "GraniteMLAPreTrainedModel",
]
