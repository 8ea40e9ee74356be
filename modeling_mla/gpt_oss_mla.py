"""gpt-oss with Multi-head Latent Attention: attention sinks, biases, windows in every second layer, experts."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, GptOssConfig, PreTrainedConfig
from transformers.models.gpt_oss import modeling_gpt_oss as body
from typing_extensions import override

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan
from .transformers_seams_mla import init


@strict
class GptOssMLAConfig(MLAConfigMixin, GptOssConfig):
    """`GptOssConfig` with the fields of `MLAConfigMixin`."""

    model_type = "gpt_oss_mla"
    base_model_tp_plan = mla_tp_plan(GptOssConfig.base_model_tp_plan) | {
        # Transformers' names for a parameter that has no module of its own.
        "layers.*.self_attn": "local_params",
        "layers.*.self_attn.sinks": "colwise",
    }

    @property
    @override
    def attention_sinks(self) -> bool:
        return True


class SinkMLAttention(MLAttention):
    """`MLAttention` with one learned logit a head that takes its share of the softmax."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def init_mla_weights(self, std: float) -> None:
        """Draws the sinks from a normal distribution of deviation ``std``."""
        init.normal_(self.sinks, mean=0.0, std=std)

    @override
    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward(*args, s_aux=self.sinks, **kwargs)


class GptOssMLADecoderLayer(body.GptOssDecoderLayer):
    """gpt-oss's decoder layer, experts included, with `SinkMLAttention`."""

    __init__ = built_with(body.GptOssDecoderLayer, GptOssAttention=SinkMLAttention)


class GptOssMLAPreTrainedModel(MLAPreTrainedMixin, body.GptOssPreTrainedModel):
    """The base of gpt-oss's models with MLA; their outputs are recorded from router, layer and attention."""

    config: GptOssMLAConfig
    config_class = GptOssMLAConfig
    _no_split_modules = ["GptOssMLADecoderLayer"]
    # The body says "norm", which is looked for anywhere in a name and would be found in that of the latent norm.
    _keep_in_fp32_modules = ["post_attention_layernorm", "input_layernorm", r"(?<![a-z_])norm"]
    _can_record_outputs = body.GptOssPreTrainedModel._can_record_outputs | {
        "hidden_states": GptOssMLADecoderLayer,
        "attentions": SinkMLAttention,
    }


class GptOssMLAModel(GptOssMLAPreTrainedModel, body.GptOssModel):
    """gpt-oss's decoder with `SinkMLAttention`; its `LatentCache` holds the window alone in every second layer."""

    __init__ = built_with(
        body.GptOssModel, GptOssDecoderLayer=GptOssMLADecoderLayer, GptOssRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.GptOssModel.forward)


class GptOssMLAForCausalLM(GptOssMLAPreTrainedModel, body.GptOssForCausalLM, GenerationMixin):
    """gpt-oss's language model on top of `GptOssMLAModel`, with the loss that balances its experts."""

    __init__ = built_with(body.GptOssForCausalLM, GptOssModel=GptOssMLAModel)


_heads = generic_heads(GptOssMLAPreTrainedModel)
GptOssMLAForSequenceClassification, GptOssMLAForTokenClassification, GptOssMLAForQuestionAnswering = _heads

register_family(GptOssMLAConfig, GptOssMLAModel, GptOssMLAForCausalLM, *_heads)

__all__ = [
    "GptOssMLAConfig",
    "GptOssMLAForCausalLM",
    "GptOssMLAForQuestionAnswering",
    "GptOssMLAForSequenceClassification",
    "GptOssMLAForTokenClassification",
    "GptOssMLAModel",
    "GptOssMLAPreTrainedModel",
]
