"""GraniteMoE with Multi-head Latent Attention: Granite's multipliers, experts in every layer."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, GraniteMoeConfig
from transformers.models.granitemoe import modeling_granitemoe as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class GraniteMoeMLAConfig(MLAConfigMixin, GraniteMoeConfig):
    """`GraniteMoeConfig` with the fields of `MLAConfigMixin`."""

    model_type = "granitemoe_mla"
    base_model_tp_plan = mla_tp_plan(GraniteMoeConfig.base_model_tp_plan)

    def __post_init__(self, **kwargs) -> None:
        if self.softmax_scale is None:
            self.softmax_scale = self.attention_multiplier
        super().__post_init__(**kwargs)


class GraniteMoeMLADecoderLayer(body.GraniteMoeDecoderLayer):
    """GraniteMoE's decoder layer, with experts for an MLP and `MLAttention` for its attention."""

    __init__ = built_with(body.GraniteMoeDecoderLayer, GraniteMoeAttention=MLAttention)


class GraniteMoeMLAPreTrainedModel(MLAPreTrainedMixin, body.GraniteMoePreTrainedModel):
    """The base of GraniteMoE's models with MLA; outputs are recorded from router, layer and attention."""

    config: GraniteMoeMLAConfig
    config_class = GraniteMoeMLAConfig
    _no_split_modules = ["GraniteMoeMLADecoderLayer"]
    _can_record_outputs = body.GraniteMoePreTrainedModel._can_record_outputs | {
        "hidden_states": GraniteMoeMLADecoderLayer,
        "attentions": MLAttention,
    }


class GraniteMoeMLAModel(GraniteMoeMLAPreTrainedModel, body.GraniteMoeModel):
    """GraniteMoE's decoder with `MLAttention`; the experts are the body's own."""

    __init__ = built_with(
        body.GraniteMoeModel,
        GraniteMoeDecoderLayer=GraniteMoeMLADecoderLayer,
        GraniteMoeRotaryEmbedding=MLARotaryEmbedding,
    )
    forward = with_latent_cache(body.GraniteMoeModel.forward)


class GraniteMoeMLAForCausalLM(GraniteMoeMLAPreTrainedModel, body.GraniteMoeForCausalLM, GenerationMixin):
    """GraniteMoE's language model on top of `GraniteMoeMLAModel`, with the loss that balances its experts."""

    __init__ = built_with(body.GraniteMoeForCausalLM, GraniteMoeModel=GraniteMoeMLAModel)


_heads = generic_heads(GraniteMoeMLAPreTrainedModel)
GraniteMoeMLAForSequenceClassification, GraniteMoeMLAForTokenClassification, GraniteMoeMLAForQuestionAnswering = _heads

register_family(GraniteMoeMLAConfig, GraniteMoeMLAModel, GraniteMoeMLAForCausalLM, *_heads)

__all__ = [
    "GraniteMoeMLAConfig",
    "GraniteMoeMLAForCausalLM",
    "GraniteMoeMLAForQuestionAnswering",
    "GraniteMoeMLAForSequenceClassification",
    "GraniteMoeMLAForTokenClassification",
    "GraniteMoeMLAModel",
    "GraniteMoeMLAPreTrainedModel",
]
