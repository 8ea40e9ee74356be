"""StarCoder2 with Multi-head Latent Attention: a sliding window, layer norms, biases."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, Starcoder2Config
from transformers.models.starcoder2 import modeling_starcoder2 as body
from typing_extensions import override

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class Starcoder2MLAConfig(MLAConfigMixin, Starcoder2Config):
    """`Starcoder2Config` with the fields of `MLAConfigMixin`."""

    model_type = "starcoder2_mla"
    base_model_tp_plan = mla_tp_plan(Starcoder2Config.base_model_tp_plan)


class Starcoder2MLAttention(MLAttention):
    """`MLAttention` with the dropout that StarCoder2 has behind it."""

    @override
    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(*args, **kwargs)
        return nn.functional.dropout(output, p=self.config.residual_dropout, training=self.training), weights


class Starcoder2MLADecoderLayer(body.Starcoder2DecoderLayer):
    """StarCoder2's decoder layer with `Starcoder2MLAttention`, between its layer norms."""

    __init__ = built_with(body.Starcoder2DecoderLayer, Starcoder2Attention=Starcoder2MLAttention)


class Starcoder2MLAPreTrainedModel(MLAPreTrainedMixin, body.Starcoder2PreTrainedModel):
    """The base of StarCoder2's models with MLA: their configuration, and what outputs are recorded from."""

    config: Starcoder2MLAConfig
    config_class = Starcoder2MLAConfig
    _no_split_modules = ["Starcoder2MLADecoderLayer"]
    _can_record_outputs = {"hidden_states": Starcoder2MLADecoderLayer, "attentions": Starcoder2MLAttention}


class Starcoder2MLAModel(Starcoder2MLAPreTrainedModel, body.Starcoder2Model):
    """StarCoder2's decoder with `Starcoder2MLAttention`; one window serves all layers, or there is none."""

    __init__ = built_with(
        body.Starcoder2Model,
        Starcoder2DecoderLayer=Starcoder2MLADecoderLayer,
        Starcoder2RotaryEmbedding=MLARotaryEmbedding,
    )
    forward = with_latent_cache(body.Starcoder2Model.forward)


class Starcoder2MLAForCausalLM(Starcoder2MLAPreTrainedModel, body.Starcoder2ForCausalLM, GenerationMixin):
    """StarCoder2's language model on top of `Starcoder2MLAModel`."""

    __init__ = built_with(body.Starcoder2ForCausalLM, Starcoder2Model=Starcoder2MLAModel)


_heads = generic_heads(Starcoder2MLAPreTrainedModel)
Starcoder2MLAForSequenceClassification, Starcoder2MLAForTokenClassification, Starcoder2MLAForQuestionAnswering = _heads

register_family(Starcoder2MLAConfig, Starcoder2MLAModel, Starcoder2MLAForCausalLM, *_heads)

__all__ = [
    "Starcoder2MLAConfig",
    "Starcoder2MLAForCausalLM",
    "Starcoder2MLAForQuestionAnswering",
    "Starcoder2MLAForSequenceClassification",
    "Starcoder2MLAForTokenClassification",
    "Starcoder2MLAModel",
    "Starcoder2MLAPreTrainedModel",
]
