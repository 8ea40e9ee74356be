"""Qwen2 and Qwen2.5 with Multi-head Latent Attention."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class Qwen2MLAConfig(MLAConfigMixin, Qwen2Config):
    """`Qwen2Config` with the fields of `MLAConfigMixin`."""

    model_type = "qwen2_mla"
    base_model_tp_plan = mla_tp_plan(Qwen2Config.base_model_tp_plan)


class Qwen2MLADecoderLayer(body.Qwen2DecoderLayer):
    """Qwen2's decoder layer, which builds an `MLAttention` for its attention."""

    __init__ = built_with(body.Qwen2DecoderLayer, Qwen2Attention=MLAttention)


class Qwen2MLAPreTrainedModel(MLAPreTrainedMixin, body.Qwen2PreTrainedModel):
    """The base of Qwen2's models with MLA: their configuration, and what their outputs are recorded from."""

    config: Qwen2MLAConfig
    config_class = Qwen2MLAConfig
    _no_split_modules = ["Qwen2MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Qwen2MLADecoderLayer, "attentions": MLAttention}


class Qwen2MLAModel(Qwen2MLAPreTrainedModel, body.Qwen2Model):
    """Qwen2's decoder with `MLAttention`; its cache is a `LatentCache` by default."""

    __init__ = built_with(
        body.Qwen2Model, Qwen2DecoderLayer=Qwen2MLADecoderLayer, Qwen2RotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.Qwen2Model.forward)


class Qwen2MLAForCausalLM(Qwen2MLAPreTrainedModel, body.Qwen2ForCausalLM, GenerationMixin):
    """Qwen2's language model on top of `Qwen2MLAModel`."""

    __init__ = built_with(body.Qwen2ForCausalLM, Qwen2Model=Qwen2MLAModel)


_heads = generic_heads(Qwen2MLAPreTrainedModel)
Qwen2MLAForSequenceClassification, Qwen2MLAForTokenClassification, Qwen2MLAForQuestionAnswering = _heads

register_family(Qwen2MLAConfig, Qwen2MLAModel, Qwen2MLAForCausalLM, *_heads)

__all__ = [
    "Qwen2MLAConfig",
    "Qwen2MLAForCausalLM",
    "Qwen2MLAForQuestionAnswering",
    "Qwen2MLAForSequenceClassification",
    "Qwen2MLAForTokenClassification",
    "Qwen2MLAModel",
    "Qwen2MLAPreTrainedModel",
]
