"""Gemma 3's text model with Multi-head Latent Attention: norms a head, windows, two rotary bases."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Gemma3TextConfig, GenerationMixin
from transformers.models.gemma3 import modeling_gemma3 as body
from typing_extensions import override

from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .qk_norm_mla import NormedMLAConfigMixin, NormedMLAttention, normed_mla_tp_plan
from .rope_mla import ByLayerType, MLARotaryEmbedding


@strict
class Gemma3MLAConfig(NormedMLAConfigMixin, Gemma3TextConfig):
    """`Gemma3TextConfig` with the fields of `NormedMLAConfigMixin`.

    ``softmax_scale`` is that of ``query_pre_attn_scalar``.
    """

    model_type = "gemma3_text_mla"
    base_model_tp_plan = normed_mla_tp_plan(Gemma3TextConfig.base_model_tp_plan)

    def __post_init__(self, **kwargs) -> None:
        if self.softmax_scale is None:
            self.softmax_scale = self.query_pre_attn_scalar**-0.5
        super().__post_init__(**kwargs)


class Gemma3MLAttention(NormedMLAttention):
    """`NormedMLAttention` with Gemma's norm, which multiplies by one plus its weight."""

    @override
    def make_norm(self, heads: int) -> nn.Module:
        return body.Gemma3RMSNorm(self.norm_dim, eps=self.config.rms_norm_eps)


class Gemma3MLARotaryEmbedding(ByLayerType, body.Gemma3RotaryEmbedding):
    """Gemma 3\'s rotary tables, one for each kind of layer, by the channels that are rotated here."""


def gemma3_rotary(config: Gemma3MLAConfig) -> nn.Module:
    """By explicit frequencies, or by those of ``rope_parameters``."""
    return (Gemma3MLARotaryEmbedding if config.rope_inv_freq is None else MLARotaryEmbedding)(config)


class Gemma3MLADecoderLayer(body.Gemma3DecoderLayer):
    """Gemma 3's decoder layer with `Gemma3MLAttention`, between the two norms that it has around a block."""

    __init__ = built_with(body.Gemma3DecoderLayer, Gemma3Attention=Gemma3MLAttention)


class Gemma3MLAPreTrainedModel(MLAPreTrainedMixin, body.Gemma3PreTrainedModel):
    """The base of Gemma 3's text models with MLA: their configuration, and what outputs are recorded from."""

    config: Gemma3MLAConfig
    config_class = Gemma3MLAConfig
    input_modalities = ("text",)
    _no_split_modules = ["Gemma3MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Gemma3MLADecoderLayer, "attentions": Gemma3MLAttention}


class Gemma3MLAModel(Gemma3MLAPreTrainedModel, body.Gemma3TextModel):
    """Gemma 3's text decoder with `Gemma3MLAttention`; layers with a window rotate by a base of their own."""

    __init__ = built_with(
        body.Gemma3TextModel, Gemma3DecoderLayer=Gemma3MLADecoderLayer, Gemma3RotaryEmbedding=gemma3_rotary
    )
    forward = with_latent_cache(body.Gemma3TextModel.forward)


class Gemma3MLAForCausalLM(Gemma3MLAPreTrainedModel, body.Gemma3ForCausalLM, GenerationMixin):
    """Gemma 3's language model of text alone, on top of `Gemma3MLAModel`."""

    __init__ = built_with(body.Gemma3ForCausalLM, Gemma3TextModel=Gemma3MLAModel)


_heads = generic_heads(Gemma3MLAPreTrainedModel)
Gemma3MLAForSequenceClassification, Gemma3MLAForTokenClassification, Gemma3MLAForQuestionAnswering = _heads

register_family(Gemma3MLAConfig, Gemma3MLAModel, Gemma3MLAForCausalLM, *_heads)

__all__ = [
    "Gemma3MLAConfig",
    "Gemma3MLAForCausalLM",
    "Gemma3MLAForQuestionAnswering",
    "Gemma3MLAForSequenceClassification",
    "Gemma3MLAForTokenClassification",
    "Gemma3MLAModel",
    "Gemma3MLAPreTrainedModel",
]
