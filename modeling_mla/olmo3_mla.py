"""OLMo 3 with Multi-head Latent Attention: as OLMo 2, with windows, and a rotary scaling in the layers without."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, Olmo3Config
from transformers.models.olmo3 import modeling_olmo3 as body

from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .olmo_attention_mla import OlmoMLARotaryEmbedding, OlmoMLAttention
from .qk_norm_mla import NormedMLAConfigMixin, normed_mla_tp_plan
from .rope_mla import ByLayerType


@strict
class Olmo3MLAConfig(NormedMLAConfigMixin, Olmo3Config):
    """`Olmo3Config` with the fields of `NormedMLAConfigMixin`."""

    model_type = "olmo3_mla"
    base_model_tp_plan = normed_mla_tp_plan(Olmo3Config.base_model_tp_plan, norm_spans_heads=True)


class Olmo3MLARotaryEmbedding(ByLayerType, body.Olmo3RotaryEmbedding):
    """OLMo 3\'s rotary tables, one for each kind of layer, by the channels that are rotated here."""


def olmo3_rotary(config: Olmo3MLAConfig) -> nn.Module:
    """By explicit frequencies, or by those of ``rope_parameters``."""
    return (Olmo3MLARotaryEmbedding if config.rope_inv_freq is None else OlmoMLARotaryEmbedding)(config)


class Olmo3MLADecoderLayer(body.Olmo3DecoderLayer):
    """OLMo 3's decoder layer with OLMo 2's attention, `OlmoMLAttention`, which may have a window."""

    __init__ = built_with(body.Olmo3DecoderLayer, Olmo3Attention=OlmoMLAttention)


class Olmo3MLAPreTrainedModel(MLAPreTrainedMixin, body.Olmo3PreTrainedModel):
    """The base of OLMo 3's models with MLA: their configuration, and what their outputs are recorded from."""

    config: Olmo3MLAConfig
    config_class = Olmo3MLAConfig
    _no_split_modules = ["Olmo3MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Olmo3MLADecoderLayer, "attentions": OlmoMLAttention}


class Olmo3MLAModel(Olmo3MLAPreTrainedModel, body.Olmo3Model):
    """OLMo 3's decoder with `OlmoMLAttention`; layers with a window rotate unscaled, the others may be scaled."""

    __init__ = built_with(body.Olmo3Model, Olmo3DecoderLayer=Olmo3MLADecoderLayer, Olmo3RotaryEmbedding=olmo3_rotary)
    forward = with_latent_cache(body.Olmo3Model.forward)


class Olmo3MLAForCausalLM(Olmo3MLAPreTrainedModel, body.Olmo3ForCausalLM, GenerationMixin):
    """OLMo 3's language model on top of `Olmo3MLAModel`."""

    __init__ = built_with(body.Olmo3ForCausalLM, Olmo3Model=Olmo3MLAModel)


_heads = generic_heads(Olmo3MLAPreTrainedModel)
Olmo3MLAForSequenceClassification, Olmo3MLAForTokenClassification, Olmo3MLAForQuestionAnswering = _heads

register_family(Olmo3MLAConfig, Olmo3MLAModel, Olmo3MLAForCausalLM, *_heads)

__all__ = [
    "Olmo3MLAConfig",
    "Olmo3MLAForCausalLM",
    "Olmo3MLAForQuestionAnswering",
    "Olmo3MLAForSequenceClassification",
    "Olmo3MLAForTokenClassification",
    "Olmo3MLAModel",
    "Olmo3MLAPreTrainedModel",
]
