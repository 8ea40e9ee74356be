"""For vLLM's Transformers backend: zero padding to the sizes that its MLA attention has kernels for.

Nothing else changes: the padded model is the same model under the same architecture, run by vLLM with the plugin
`modeling_mla.vllm_mla`. All zeros are exact, for they meet zeros.
"""

from __future__ import annotations

import copy
import re

from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import override

from modeling_mla.configuration_mla import identity_norm_weight
from modeling_mla.vllm_mla import why_no_mla_attention

from ..errors import BudgetError, SourceError
from ..planning.deepseek_layout import HEAD_DIMS, KV_LORA_RANKS, QK_ROPE_HEAD_DIM, engine_head_dims
from .base import CheckpointExporter
from .padding import pad_parts

KV_LORA_RANK = KV_LORA_RANKS[-1]

_ATTENTION = re.compile(r"\w+\.layers\.(\d+)\.(?:self_attn|attention)\.(\w+)\.(weight|bias)")


class VllmExporter(CheckpointExporter):
    """Rank 512 and rotary key 64 in every layer, head sizes from `HEAD_DIMS`."""

    name = "vllm"
    runs = ("vllm serve {folder}",)

    @override
    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        if config.latent_code is not None:
            raise SourceError(
                "latent_code keeps this model's cache in few bits, which vLLM has no kernels for; convert it with "
                "--latent-bits 16, or serve it with Transformers."
            )
        reason = why_no_mla_attention(config)
        if reason is not None:
            raise SourceError(f"{config.model_type} {reason}; serve the model with Transformers.")
        for field, limit in (("kv_lora_rank", KV_LORA_RANK), ("qk_rope_head_dim", QK_ROPE_HEAD_DIM)):
            if getattr(config, field) > limit:
                raise BudgetError(
                    f"{field} is {getattr(config, field)}, and vLLM's kernels have {limit}; convert the model with "
                    f"--{field.replace('_', '-')} {limit} or less."
                )
        sizes = engine_head_dims(config.qk_nope_head_dim, config.v_head_dim)
        if sizes is None:
            raise SourceError(
                f"qk_nope_head_dim {config.qk_nope_head_dim} and v_head_dim {config.v_head_dim} are more than vLLM's "
                f"largest head, {HEAD_DIMS[-1]}; serve the model with Transformers."
            )
        self._refuse_unpaddable(config)
        qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        padded = copy.deepcopy(config.to_dict())
        for field in ("rope_inv_freq", "rope_long_inv_freq"):
            rows = getattr(config, field)
            if rows is not None:
                padded[field] = [row + [0.0] * (QK_ROPE_HEAD_DIM // 2 - len(row)) for row in rows]
        for derived in ("head_dim", "num_key_value_heads", "qk_head_dim"):
            padded.pop(derived, None)
        return type(config)(
            **padded
            | {
                "kv_lora_rank": KV_LORA_RANK,
                "kv_lora_ranks": None,
                "qk_rope_head_dim": QK_ROPE_HEAD_DIM,
                "qk_rope_head_dims": None,
                "qk_nope_head_dim": sizes[0],
                "qk_nope_head_dims": None,
                "v_head_dim": sizes[1],
                "softmax_scale": qk_head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale,
            }
        )

    def _refuse_unpaddable(self, config: PreTrainedConfig) -> None:
        if config.latent_norm != "identity" and config.kv_lora_rank != KV_LORA_RANK:
            raise SourceError(
                f"kv_lora_rank is {config.kv_lora_rank} with a latent norm, whose mean zeros would change; vLLM can "
                f"serve this model only with kv_lora_rank {KV_LORA_RANK}."
            )
        implicit = config.rope_inv_freq is None or config.rope_interleave
        if implicit and config.qk_rope_head_dim != QK_ROPE_HEAD_DIM:
            raise SourceError(
                f"qk_rope_head_dim is {config.qk_rope_head_dim} without explicit, half-split frequencies "
                f"(rope_inv_freq), which padding would change; vLLM can serve this model only with {QK_ROPE_HEAD_DIM}."
            )

    @override
    def tensors(
        self, name: str, tensor: Tensor, before: PreTrainedConfig, after: PreTrainedConfig
    ) -> dict[str, Tensor]:
        return {name: self._padded(name, tensor, before, after)}

    def _padded(self, name: str, tensor: Tensor, before: PreTrainedConfig, after: PreTrainedConfig) -> Tensor:
        match = _ATTENTION.fullmatch(name)
        if match is None:
            return tensor
        layer, projection = int(match.group(1)), match.group(2)
        rank, rotary = before.layer_kv_lora_rank(layer), before.layer_qk_rope_head_dim(layer)
        half, heads = rotary // 2, before.num_attention_heads
        nope = (before.layer_qk_nope_head_dim(layer), after.qk_nope_head_dim)
        value = (before.v_head_dim, after.v_head_dim)
        halves = [(half, after.qk_rope_head_dim // 2)] * 2
        latent = (rank, after.kv_lora_rank)
        if projection in ("q_proj", "q_b_proj"):
            return pad_parts(tensor.unflatten(0, (heads, -1)), 1, [nope, *halves]).flatten(0, 1)
        if projection == "kv_a_proj_with_mqa":
            return pad_parts(tensor, 0, [latent, *halves])
        if projection == "kv_a_layernorm":
            if before.latent_norm != "identity":
                return tensor
            return identity_norm_weight(after.kv_lora_rank, tensor.dtype, tensor.device)
        if projection == "kv_b_proj":
            per_head = pad_parts(tensor.unflatten(0, (heads, -1)), 1, [nope, value]).flatten(0, 1)
            return pad_parts(per_head, 1, [latent])
        if projection == "o_proj" and match.group(3) == "weight":
            return pad_parts(tensor.unflatten(1, (heads, -1)), 2, [value]).flatten(1, 2)
        return tensor
