"""Qwen3 with Multi-head Latent Attention: keys and queries are normalised a head, before compression."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3 as body

from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .qk_norm_mla import NormedMLAConfigMixin, NormedMLAttention, normed_mla_tp_plan
from .rope_mla import MLARotaryEmbedding


@strict
class Qwen3MLAConfig(NormedMLAConfigMixin, Qwen3Config):
    """`Qwen3Config` with the fields of `NormedMLAConfigMixin`."""

    model_type = "qwen3_mla"
    base_model_tp_plan = normed_mla_tp_plan(Qwen3Config.base_model_tp_plan)


class Qwen3MLADecoderLayer(body.Qwen3DecoderLayer):
    """Qwen3's decoder layer with `NormedMLAttention`, which has Qwen3's norms of queries and keys."""

    __init__ = built_with(body.Qwen3DecoderLayer, Qwen3Attention=NormedMLAttention)


class Qwen3MLAPreTrainedModel(MLAPreTrainedMixin, body.Qwen3PreTrainedModel):
    """The base of Qwen3's models with MLA: their configuration, and what their outputs are recorded from."""

    config: Qwen3MLAConfig
    config_class = Qwen3MLAConfig
    _no_split_modules = ["Qwen3MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Qwen3MLADecoderLayer, "attentions": NormedMLAttention}


class Qwen3MLAModel(Qwen3MLAPreTrainedModel, body.Qwen3Model):
    """Qwen3's decoder with `NormedMLAttention`; the latents of its `LatentCache` come of normalised keys."""

    __init__ = built_with(
        body.Qwen3Model, Qwen3DecoderLayer=Qwen3MLADecoderLayer, Qwen3RotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.Qwen3Model.forward)


class Qwen3MLAForCausalLM(Qwen3MLAPreTrainedModel, body.Qwen3ForCausalLM, GenerationMixin):
    """Qwen3's language model on top of `Qwen3MLAModel`."""

    __init__ = built_with(body.Qwen3ForCausalLM, Qwen3Model=Qwen3MLAModel)


_heads = generic_heads(Qwen3MLAPreTrainedModel)
Qwen3MLAForSequenceClassification, Qwen3MLAForTokenClassification, Qwen3MLAForQuestionAnswering = _heads

register_family(Qwen3MLAConfig, Qwen3MLAModel, Qwen3MLAForCausalLM, *_heads)

__all__ = [
    "Qwen3MLAConfig",
    "Qwen3MLAForCausalLM",
    "Qwen3MLAForQuestionAnswering",
    "Qwen3MLAForSequenceClassification",
    "Qwen3MLAForTokenClassification",
    "Qwen3MLAModel",
    "Qwen3MLAPreTrainedModel",
]
