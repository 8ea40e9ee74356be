"""Phi-3 and Phi-4 with Multi-head Latent Attention: frequencies for short and for long texts."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Phi3Config
from transformers.models.phi3 import modeling_phi3 as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class Phi3MLAConfig(MLAConfigMixin, Phi3Config):
    """`Phi3Config` with the fields of `MLAConfigMixin`."""

    model_type = "phi3_mla"
    base_model_tp_plan = mla_tp_plan(Phi3Config.base_model_tp_plan)


class Phi3MLADecoderLayer(body.Phi3DecoderLayer):
    """Phi-3's decoder layer with `MLAttention`, which has projections of its own for the fused one."""

    __init__ = built_with(body.Phi3DecoderLayer, Phi3Attention=MLAttention)


class Phi3MLAPreTrainedModel(MLAPreTrainedMixin, body.Phi3PreTrainedModel):
    """The base of Phi-3's models with MLA: their configuration, and what their outputs are recorded from."""

    config: Phi3MLAConfig
    config_class = Phi3MLAConfig
    _no_split_modules = ["Phi3MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Phi3MLADecoderLayer, "attentions": MLAttention}


class Phi3MLAModel(Phi3MLAPreTrainedModel, body.Phi3Model):
    """Phi-3's decoder with `MLAttention`; beyond the original context it rotates by the long frequencies."""

    __init__ = built_with(body.Phi3Model, Phi3DecoderLayer=Phi3MLADecoderLayer, Phi3RotaryEmbedding=MLARotaryEmbedding)
    forward = with_latent_cache(body.Phi3Model.forward)


class Phi3MLAForCausalLM(Phi3MLAPreTrainedModel, body.Phi3ForCausalLM, GenerationMixin):
    """Phi-3's language model on top of `Phi3MLAModel`."""

    __init__ = built_with(body.Phi3ForCausalLM, Phi3Model=Phi3MLAModel)


_heads = generic_heads(Phi3MLAPreTrainedModel)
Phi3MLAForSequenceClassification, Phi3MLAForTokenClassification, Phi3MLAForQuestionAnswering = _heads

register_family(Phi3MLAConfig, Phi3MLAModel, Phi3MLAForCausalLM, *_heads)

__all__ = [
    "Phi3MLAConfig",
    "Phi3MLAForCausalLM",
    "Phi3MLAForQuestionAnswering",
    "Phi3MLAForSequenceClassification",
    "Phi3MLAForTokenClassification",
    "Phi3MLAModel",
    "Phi3MLAPreTrainedModel",
]
