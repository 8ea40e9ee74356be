"""Stock `DeepseekV3ForCausalLM` with all layers dense: Transformers, vLLM and SGLang run it without code of ours.

Sizes are those of `planning.deepseek_layout`. Transformers gives the latent norm an epsilon of 1e-6 whatever the
configuration says, so that is every norm's; against it latents are made small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3Config, PreTrainedConfig
from typing_extensions import override

from ..errors import BudgetError, SourceError
from ..planning.deepseek_layout import HEAD_DIMS, KV_LORA_RANKS, QK_ROPE_HEAD_DIM, engine_head_dims, engine_rank
from .base import CheckpointExporter
from .deepseek_form import INSTEAD, DeepseekForm, deepseek_form

LATENT_SCALE = 2.0**-24
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class StockDeepseekV3:
    """The exported model's ``config``, and its ``form``."""

    config: DeepseekV3Config
    form: DeepseekForm


class DeepseekV3Exporter(CheckpointExporter):
    """Rank 256, 448 or 512 and a rotary key of 64 in every layer, head sizes that engines have prefill kernels for."""

    name = "deepseek_v3"
    runs = ("vllm serve {folder}", "transformers serve {folder}")

    @override
    def config(self, config: PreTrainedConfig) -> StockDeepseekV3:
        rank, (nope, value) = padded_sizes(config)
        form = deepseek_form(config, rank, nope, value, NORM_EPSILON, [LATENT_SCALE] * config.num_hidden_layers)
        return StockDeepseekV3(_stock_config(config, rank, nope, value), form)

    @override
    def tensors(self, name: str, tensor: Tensor, before: PreTrainedConfig, after: StockDeepseekV3) -> dict[str, Tensor]:
        made = after.form.tensors(name, tensor)
        if name == "model.embed_tokens.weight" and before.tie_word_embeddings:
            # Engines never fill a head that is tied, and embeddings are scaled.
            made["lm_head.weight"] = tensor.clone()
        return made

    @override
    def save_config(self, after: StockDeepseekV3, folder: Path) -> None:
        after.config.save_pretrained(folder)

    @override
    def cache_bytes_per_token(self, after: StockDeepseekV3, dtype: torch.dtype) -> int:
        config = after.config
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize


def padded_sizes(config: PreTrainedConfig) -> tuple[int, tuple[int, int]]:
    """The rank of engines, and their head sizes, that hold a model's.

    Raises:
        BudgetError: no rank does.
        SourceError: no head size does.
    """
    rank = engine_rank(config.kv_lora_rank)
    if rank is None:
        raise BudgetError(
            f"kv_lora_rank is {config.kv_lora_rank}, and engines have {KV_LORA_RANKS[-1]} at most; convert with "
            f"--kv-lora-rank {KV_LORA_RANKS[-1]} or less."
        )
    sizes = engine_head_dims(config.qk_nope_head_dim, config.v_head_dim)
    if sizes is None:
        raise SourceError(
            f"qk_nope_head_dim {config.qk_nope_head_dim} and v_head_dim {config.v_head_dim} are more than engines' "
            f"largest head, {HEAD_DIMS[-1]}; {INSTEAD}."
        )
    return rank, sizes


def _stock_config(config: PreTrainedConfig, rank: int, nope: int, value: int) -> DeepseekV3Config:
    kept = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "dtype"]
    kept += ["max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    return DeepseekV3Config(
        **{name: getattr(config, name) for name in kept},
        architectures=["DeepseekV3ForCausalLM"],
        num_key_value_heads=config.num_attention_heads,
        kv_lora_rank=rank,
        q_lora_rank=None,
        qk_rope_head_dim=QK_ROPE_HEAD_DIM,
        qk_nope_head_dim=nope,
        v_head_dim=value,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]},
        rope_interleave=True,
        attention_bias=False,
        tie_word_embeddings=False,
        # No layer has experts, but the numbers of some must be there.
        first_k_dense_replace=config.num_hidden_layers,
        moe_intermediate_size=config.intermediate_size,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    )
