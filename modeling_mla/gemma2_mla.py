"""Gemma 2 with Multi-head Latent Attention: capped scores, windows in every second layer."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Gemma2Config, GenerationMixin
from transformers.models.gemma2 import modeling_gemma2 as body
from typing_extensions import override

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class Gemma2MLAConfig(MLAConfigMixin, Gemma2Config):
    """`Gemma2Config` with the fields of `MLAConfigMixin`; ``softmax_scale`` is that of ``query_pre_attn_scalar``."""

    model_type = "gemma2_mla"
    base_model_tp_plan = mla_tp_plan(Gemma2Config.base_model_tp_plan)

    def __post_init__(self, **kwargs) -> None:
        if self.softmax_scale is None:
            self.softmax_scale = self.query_pre_attn_scalar**-0.5
        super().__post_init__(**kwargs)

    @property
    @override
    def attention_softcap(self) -> float | None:
        return self.attn_logit_softcapping


class Gemma2MLADecoderLayer(body.Gemma2DecoderLayer):
    """Gemma 2's decoder layer with `MLAttention`, which caps scores and, in every second layer, has a window."""

    __init__ = built_with(body.Gemma2DecoderLayer, Gemma2Attention=MLAttention)


class Gemma2MLAPreTrainedModel(MLAPreTrainedMixin, body.Gemma2PreTrainedModel):
    """The base of Gemma 2's models with MLA: their configuration, and what their outputs are recorded from."""

    config: Gemma2MLAConfig
    config_class = Gemma2MLAConfig
    _no_split_modules = ["Gemma2MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Gemma2MLADecoderLayer, "attentions": MLAttention}


class Gemma2MLAModel(Gemma2MLAPreTrainedModel, body.Gemma2Model):
    """Gemma 2's decoder with `MLAttention`; its `LatentCache` keeps the window alone where a layer has one."""

    __init__ = built_with(
        body.Gemma2Model, Gemma2DecoderLayer=Gemma2MLADecoderLayer, Gemma2RotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.Gemma2Model.forward)


class Gemma2MLAForCausalLM(Gemma2MLAPreTrainedModel, body.Gemma2ForCausalLM, GenerationMixin):
    """Gemma 2's language model on top of `Gemma2MLAModel`; it caps its logits."""

    __init__ = built_with(body.Gemma2ForCausalLM, Gemma2Model=Gemma2MLAModel)


_heads = generic_heads(Gemma2MLAPreTrainedModel)
Gemma2MLAForSequenceClassification, Gemma2MLAForTokenClassification, Gemma2MLAForQuestionAnswering = _heads

register_family(Gemma2MLAConfig, Gemma2MLAModel, Gemma2MLAForCausalLM, *_heads)

__all__ = [
    "Gemma2MLAConfig",
    "Gemma2MLAForCausalLM",
    "Gemma2MLAForQuestionAnswering",
    "Gemma2MLAForSequenceClassification",
    "Gemma2MLAForTokenClassification",
    "Gemma2MLAModel",
    "Gemma2MLAPreTrainedModel",
]
