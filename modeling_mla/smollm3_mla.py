"""SmolLM3 with Multi-head Latent Attention: some layers have no rotary key."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, SmolLM3Config
from transformers.models.smollm3 import modeling_smollm3 as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class SmolLM3MLAConfig(MLAConfigMixin, SmolLM3Config):
    """`SmolLM3Config` with the fields of `MLAConfigMixin`."""

    model_type = "smollm3_mla"
    base_model_tp_plan = mla_tp_plan(SmolLM3Config.base_model_tp_plan)

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        rotates = self.no_rope_layers[: self.num_hidden_layers]
        if self.rope_inv_freq is None and self.qk_rope_head_dims is None and not all(rotates):
            self.qk_rope_head_dims = [self.qk_rope_head_dim if own else 0 for own in rotates]


class SmolLM3MLADecoderLayer(body.SmolLM3DecoderLayer):
    """SmolLM3's decoder layer with `MLAttention`, whose rotary key may have no channels."""

    __init__ = built_with(body.SmolLM3DecoderLayer, SmolLM3Attention=MLAttention)


class SmolLM3MLAPreTrainedModel(MLAPreTrainedMixin, body.SmolLM3PreTrainedModel):
    """The base of SmolLM3's models with MLA: their configuration, and what their outputs are recorded from."""

    config: SmolLM3MLAConfig
    config_class = SmolLM3MLAConfig
    _no_split_modules = ["SmolLM3MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": SmolLM3MLADecoderLayer, "attentions": MLAttention}


class SmolLM3MLAModel(SmolLM3MLAPreTrainedModel, body.SmolLM3Model):
    """SmolLM3's decoder with `MLAttention`; layers without rotation cache latents alone."""

    __init__ = built_with(
        body.SmolLM3Model, SmolLM3DecoderLayer=SmolLM3MLADecoderLayer, SmolLM3RotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.SmolLM3Model.forward)


class SmolLM3MLAForCausalLM(SmolLM3MLAPreTrainedModel, body.SmolLM3ForCausalLM, GenerationMixin):
    """SmolLM3's language model on top of `SmolLM3MLAModel`."""

    __init__ = built_with(body.SmolLM3ForCausalLM, SmolLM3Model=SmolLM3MLAModel)


_heads = generic_heads(SmolLM3MLAPreTrainedModel)
SmolLM3MLAForSequenceClassification, SmolLM3MLAForTokenClassification, SmolLM3MLAForQuestionAnswering = _heads

register_family(SmolLM3MLAConfig, SmolLM3MLAModel, SmolLM3MLAForCausalLM, *_heads)

__all__ = [
    "SmolLM3MLAConfig",
    "SmolLM3MLAForCausalLM",
    "SmolLM3MLAForQuestionAnswering",
    "SmolLM3MLAForSequenceClassification",
    "SmolLM3MLAForTokenClassification",
    "SmolLM3MLAModel",
    "SmolLM3MLAPreTrainedModel",
]
