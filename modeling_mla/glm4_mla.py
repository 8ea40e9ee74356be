"""GLM-4 with Multi-head Latent Attention: norms in front of and behind every block."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Glm4Config
from transformers.models.glm4 import modeling_glm4 as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class Glm4MLAConfig(MLAConfigMixin, Glm4Config):
    """`Glm4Config` with the fields of `MLAConfigMixin`."""

    model_type = "glm4_mla"
    base_model_tp_plan = mla_tp_plan(Glm4Config.base_model_tp_plan)


class Glm4MLADecoderLayer(body.Glm4DecoderLayer):
    """GLM-4's decoder layer with `MLAttention`, whose output is normalised before it is added."""

    __init__ = built_with(body.Glm4DecoderLayer, Glm4Attention=MLAttention)


class Glm4MLAPreTrainedModel(MLAPreTrainedMixin, body.Glm4PreTrainedModel):
    """The base of GLM-4's models with MLA: their configuration, and what their outputs are recorded from."""

    config: Glm4MLAConfig
    config_class = Glm4MLAConfig
    _no_split_modules = ["Glm4MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Glm4MLADecoderLayer, "attentions": MLAttention}


class Glm4MLAModel(Glm4MLAPreTrainedModel, body.Glm4Model):
    """GLM-4's decoder with `MLAttention`; all channels of the shared rotary key rotate, of GLM-4's heads a part."""

    __init__ = built_with(body.Glm4Model, Glm4DecoderLayer=Glm4MLADecoderLayer, Glm4RotaryEmbedding=MLARotaryEmbedding)
    forward = with_latent_cache(body.Glm4Model.forward)


class Glm4MLAForCausalLM(Glm4MLAPreTrainedModel, body.Glm4ForCausalLM, GenerationMixin):
    """GLM-4's language model on top of `Glm4MLAModel`."""

    __init__ = built_with(body.Glm4ForCausalLM, Glm4Model=Glm4MLAModel)


_heads = generic_heads(Glm4MLAPreTrainedModel)
Glm4MLAForSequenceClassification, Glm4MLAForTokenClassification, Glm4MLAForQuestionAnswering = _heads

register_family(Glm4MLAConfig, Glm4MLAModel, Glm4MLAForCausalLM, *_heads)

__all__ = [
    "Glm4MLAConfig",
    "Glm4MLAForCausalLM",
    "Glm4MLAForQuestionAnswering",
    "Glm4MLAForSequenceClassification",
    "Glm4MLAForTokenClassification",
    "Glm4MLAModel",
    "Glm4MLAPreTrainedModel",
]
