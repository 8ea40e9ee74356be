"""For mlx-lm: a folder that brings its own model file, `mlx_model`, so that any conversion runs there as it is."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from typing_extensions import override

from modeling_mla.attention_mla import MLAttention
from modeling_mla.configuration_mla import MLAConfigMixin, norm_epsilon
from modeling_mla.qk_norm_mla import NormedMLAConfigMixin, NormedMLAttention

from ..checkpoint.atomic import write_json
from .attention_facts import Rotation, attention_layers
from .base import CheckpointExporter
from .mlx_bodies import mlx_body

MODEL_FILE = Path(__file__).with_name("mlx_model.py")
"""What travels with every export."""
_ATTENTION = re.compile(r"(\w+\.layers\.(\d+)\.(?:self_attn|attention)\.)(\w+)\.(?:weight|bias)")
_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)(_bias)?")
_UNREAD = {"auto_map", "architectures", "head_dim", "num_key_value_heads", "qk_head_dim", "rope_parameters"}
_UNREAD |= {"base_model_tp_plan", "base_model_pp_plan", "transformers_version"}
"""Fields that Transformers reads and `mlx_model` does not."""


class MlxExporter(CheckpointExporter):
    """Every family, with per-layer ranks, biases, frequencies, norms and windows. Latents are cached uncoded."""

    name = "mlx"
    reads_head_maps = True
    runs = ("mlx_lm.chat --model {folder} --trust-remote-code", "mlx_lm.server --model {folder} --trust-remote-code")

    @override
    def config(self, config: PreTrainedConfig) -> dict[str, Any]:
        body = mlx_body(config)
        attentions, rotations = attention_layers(config)
        layers = [layer_facts(config, *layer) for layer in zip(attentions, rotations, strict=True)]
        own = {field.name for mixin in (MLAConfigMixin, NormedMLAConfigMixin) for field in fields(mixin)}
        kept = {name: value for name, value in config.to_dict().items() if name not in own | _UNREAD}
        # mlx-lm knows some fields by the names that Transformers had for them before.
        kept |= {alias: kept[name] for alias, name in config.attribute_map.items() if name in kept}
        mla = {
            "body": body.module,
            "attention": body.attention,
            "mlp": body.own_mlp(config),
            "layers": layers,
        }
        return kept | {"model_file": MODEL_FILE.name, "mla": mla}

    @override
    def tensors(self, name: str, tensor: Tensor, before: PreTrainedConfig, after: dict[str, Any]) -> dict[str, Tensor]:
        if tensor.dtype == torch.float64:
            # Which GPUs of Apple's do not know.
            tensor = tensor.float()
        experts = _EXPERTS.fullmatch(name)
        if experts is not None and before.model_type == "gpt_oss_mla":
            return _gpt_oss_experts(experts, tensor)
        match = _ATTENTION.fullmatch(name)
        if match is None:
            return {name: tensor}
        prefix, layer, projection = match.groups()
        if projection == "kv_a_layernorm" and before.latent_norm == "identity":
            return {}
        if projection == "kv_b_proj":
            nope = before.layer_qk_nope_head_dim(int(layer))
            key, value = tensor.unflatten(0, (before.num_attention_heads, -1)).split_with_sizes(
                [nope, before.v_head_dim], dim=1
            )
            return {f"{prefix}embed_q.weight": key.mT.contiguous(), f"{prefix}unembed_out.weight": value.contiguous()}
        return {name: tensor}

    @override
    def save_config(self, after: dict[str, Any], folder: Path) -> None:
        write_json(folder / "config.json", after)
        shutil.copyfile(MODEL_FILE, folder / MODEL_FILE.name)

    @override
    def cache_bytes_per_token(self, after: dict[str, Any], dtype: torch.dtype) -> int:
        widths = (layer["kv_lora_rank"] + layer["qk_rope_head_dim"] for layer in after["mla"]["layers"])
        return sum(widths) * (torch.float32 if dtype == torch.float64 else dtype).itemsize


def layer_facts(config: PreTrainedConfig, attention: MLAttention, rotation: Rotation) -> dict[str, Any]:
    """What `mlx_model` is told of one layer."""
    rows = [row.tolist() for row in (rotation.inv_freq, rotation.long_inv_freq) if row is not None]
    facts: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_lora_rank": attention.kv_lora_rank,
        "q_lora_rank": attention.q_lora_rank,
        "q_head_dim": attention.q_head_dim,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "scale": attention.scaling,
        "window": attention.sliding_window,
        "softcap": attention.softcap,
        "sinks": config.attention_sinks,
        "eps": norm_epsilon(config),
        "latent_norm": config.latent_norm == "rms_norm",
        "q_bias": config.q_bias,
        "kv_a_bias": config.kv_a_bias,
        "o_bias": config.o_bias,
        "inv_freq": rows,
        "rope_factor": rotation.factor,
        "rope_interleave": attention.rope_interleave,
        "original_context": config.rope_parameters["original_max_position_embeddings"] if len(rows) > 1 else None,
        "qk_norm": None,
    }
    if isinstance(attention, NormedMLAttention):
        bias = attention.k_proj.bias is not None
        facts |= {
            "qk_norm": _norm_kind(attention.q_norm, attention.norm_dim),
            "qk_norm_head_dim": attention.norm_dim,
            "qk_norm_key_heads": config.qk_norm_key_heads,
            "qk_norm_bias": bias,
            "q_bias": bias,
            "kv_a_bias": config.latent_bias,
        }
    return facts


def _norm_kind(norm: nn.Module, size: int) -> str:
    """As `mlx_model` calls the norm of queries and keys of ``size`` channels a head."""
    if isinstance(norm, CohereLayerNorm):
        return "layer"
    if isinstance(norm, Gemma3RMSNorm):
        return "gemma"
    assert isinstance(norm.weight, Tensor)
    return "rms" if norm.weight.numel() == size else "rms_all"


def _gpt_oss_experts(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """The experts of gpt-oss ``[E, in, out]``, gate and up interleaved, as mlx-lm has them: apart, ``[E, out, in]``."""
    prefix, projection, bias = match.groups()
    kind = "weight" if bias is None else "bias"
    stored = tensor if bias else tensor.mT
    if projection == "down_proj":
        return {f"{prefix}down_proj.{kind}": stored.contiguous()}
    parts = {"gate_proj": stored[:, 0::2], "up_proj": stored[:, 1::2]}
    return {f"{prefix}{name}.{kind}": part.contiguous() for name, part in parts.items()}
