"""OLMo 2 with Multi-head Latent Attention: keys and queries are normalised over all heads, before compression."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Olmo2Config
from transformers.models.olmo2 import modeling_olmo2 as body

from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .olmo_attention_mla import OlmoMLARotaryEmbedding, OlmoMLAttention
from .qk_norm_mla import NormedMLAConfigMixin, normed_mla_tp_plan


@strict
class Olmo2MLAConfig(NormedMLAConfigMixin, Olmo2Config):
    """`Olmo2Config` with the fields of `NormedMLAConfigMixin`."""

    model_type = "olmo2_mla"
    base_model_tp_plan = normed_mla_tp_plan(Olmo2Config.base_model_tp_plan, norm_spans_heads=True)


class Olmo2MLADecoderLayer(body.Olmo2DecoderLayer):
    """OLMo 2's decoder layer with `OlmoMLAttention`, which has a norm behind it and none before."""

    __init__ = built_with(body.Olmo2DecoderLayer, Olmo2Attention=OlmoMLAttention)


class Olmo2MLAPreTrainedModel(MLAPreTrainedMixin, body.Olmo2PreTrainedModel):
    """The base of OLMo 2's models with MLA: their configuration, and what their outputs are recorded from."""

    config: Olmo2MLAConfig
    config_class = Olmo2MLAConfig
    _no_split_modules = ["Olmo2MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Olmo2MLADecoderLayer, "attentions": OlmoMLAttention}


class Olmo2MLAModel(Olmo2MLAPreTrainedModel, body.Olmo2Model):
    """OLMo 2's decoder with `OlmoMLAttention`; the latents of its cache come of keys normalised over all heads."""

    __init__ = built_with(
        body.Olmo2Model, Olmo2DecoderLayer=Olmo2MLADecoderLayer, Olmo2RotaryEmbedding=OlmoMLARotaryEmbedding
    )
    forward = with_latent_cache(body.Olmo2Model.forward)


class Olmo2MLAForCausalLM(Olmo2MLAPreTrainedModel, body.Olmo2ForCausalLM, GenerationMixin):
    """OLMo 2's language model on top of `Olmo2MLAModel`."""

    __init__ = built_with(body.Olmo2ForCausalLM, Olmo2Model=Olmo2MLAModel)


_heads = generic_heads(Olmo2MLAPreTrainedModel)
Olmo2MLAForSequenceClassification, Olmo2MLAForTokenClassification, Olmo2MLAForQuestionAnswering = _heads

register_family(Olmo2MLAConfig, Olmo2MLAModel, Olmo2MLAForCausalLM, *_heads)

__all__ = [
    "Olmo2MLAConfig",
    "Olmo2MLAForCausalLM",
    "Olmo2MLAForQuestionAnswering",
    "Olmo2MLAForSequenceClassification",
    "Olmo2MLAForTokenClassification",
    "Olmo2MLAModel",
    "Olmo2MLAPreTrainedModel",
]
