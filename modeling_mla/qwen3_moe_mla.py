"""Qwen3's mixture of experts with Multi-head Latent Attention: keys and queries are normalised a head, as in Qwen3."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as body

from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .qk_norm_mla import NormedMLAConfigMixin, NormedMLAttention, normed_mla_tp_plan
from .rope_mla import MLARotaryEmbedding


@strict
class Qwen3MoeMLAConfig(NormedMLAConfigMixin, Qwen3MoeConfig):
    """`Qwen3MoeConfig` with the fields of `NormedMLAConfigMixin`."""

    model_type = "qwen3_moe_mla"
    base_model_tp_plan = normed_mla_tp_plan(Qwen3MoeConfig.base_model_tp_plan)


class Qwen3MoeMLADecoderLayer(body.Qwen3MoeDecoderLayer):
    """Qwen3-MoE's decoder layer, with experts where the configuration says so, and `NormedMLAttention`."""

    __init__ = built_with(body.Qwen3MoeDecoderLayer, Qwen3MoeAttention=NormedMLAttention)


class Qwen3MoeMLAPreTrainedModel(MLAPreTrainedMixin, body.Qwen3MoePreTrainedModel):
    """The base of Qwen3-MoE's models with MLA; outputs are recorded from router, layer and attention."""

    config: Qwen3MoeMLAConfig
    config_class = Qwen3MoeMLAConfig
    _no_split_modules = ["Qwen3MoeMLADecoderLayer"]
    _can_record_outputs = body.Qwen3MoePreTrainedModel._can_record_outputs | {
        "hidden_states": Qwen3MoeMLADecoderLayer,
        "attentions": NormedMLAttention,
    }


class Qwen3MoeMLAModel(Qwen3MoeMLAPreTrainedModel, body.Qwen3MoeModel):
    """Qwen3-MoE's decoder with `NormedMLAttention`; what it caches comes of normalised keys, as in Qwen3."""

    __init__ = built_with(
        body.Qwen3MoeModel, Qwen3MoeDecoderLayer=Qwen3MoeMLADecoderLayer, Qwen3MoeRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.Qwen3MoeModel.forward)


class Qwen3MoeMLAForCausalLM(Qwen3MoeMLAPreTrainedModel, body.Qwen3MoeForCausalLM, GenerationMixin):
    """Qwen3-MoE's language model on top of `Qwen3MoeMLAModel`, with the loss that balances its experts."""

    __init__ = built_with(body.Qwen3MoeForCausalLM, Qwen3MoeModel=Qwen3MoeMLAModel)


_heads = generic_heads(Qwen3MoeMLAPreTrainedModel)
Qwen3MoeMLAForSequenceClassification, Qwen3MoeMLAForTokenClassification, Qwen3MoeMLAForQuestionAnswering = _heads

register_family(Qwen3MoeMLAConfig, Qwen3MoeMLAModel, Qwen3MoeMLAForCausalLM, *_heads)

__all__ = [
    "Qwen3MoeMLAConfig",
    "Qwen3MoeMLAForCausalLM",
    "Qwen3MoeMLAForQuestionAnswering",
    "Qwen3MoeMLAForSequenceClassification",
    "Qwen3MoeMLAForTokenClassification",
    "Qwen3MoeMLAModel",
    "Qwen3MoeMLAPreTrainedModel",
]
