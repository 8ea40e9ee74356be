"""From a source's configuration to that of the converted model: the body's fields, and those of its attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoint.json_fields import passed_on
from ..layers import AttentionGeometry, MLAWeights

BIASES = ("q_proj_bias", "kv_a_proj_with_mqa_bias", "o_proj_bias")
_REPLACED = {
    "architectures",
    "attention_bias",
    "dtype",
    "head_dim",
    "model_type",
    "num_key_value_heads",
    "quantization",
    "quantization_config",
    "transformers_version",
}


def converted_config(
    source: PreTrainedConfig,
    mla_class: type[PreTrainedConfig],
    geometry: AttentionGeometry,
    layers: Iterable[MLAWeights],
    dtype: torch.dtype,
    family_fields: dict[str, Any],
) -> PreTrainedConfig:
    """The body of ``source`` with the attention of ``layers``.

    Args:
        mla_class: of the converted family.
        geometry: of a layer.
        dtype: of the weights.
        family_fields: what the family has beside the common fields.
    """
    ranks, rows, codes, biased, head_dims = [], [], [], set(), set()
    for weights in layers:
        ranks.append(weights.kv_b_proj.shape[1])
        rows.append(weights.inv_freq.float().tolist())
        codes.append(None if weights.code is None else weights.code.to_dict())
        biased |= {name for name in BIASES if getattr(weights, name) is not None}
        head_dims.add((weights.qk_nope_head_dim, weights.v_head_dim))
    widths = [2 * len(row) for row in rows]
    ((qk_nope_head_dim, v_head_dim),) = head_dims
    return mla_class(
        **_body(source, mla_class),
        architectures=[mla_class.__name__.removesuffix("Config") + "ForCausalLM"],
        dtype=dtype,
        kv_lora_rank=max(ranks),
        kv_lora_ranks=ranks if len(set(ranks)) > 1 else None,
        q_lora_rank=None,
        qk_nope_head_dim=qk_nope_head_dim,
        qk_rope_head_dim=max(widths),
        qk_rope_head_dims=widths if len(set(widths)) > 1 else None,
        v_head_dim=v_head_dim,
        rope_interleave=False,
        rope_inv_freq=rows if any(row != rows[0] for row in rows) else rows[:1],
        rope_inv_freq_source={"head_dim": geometry.rotary_dim, "rope_parameters": dict(source.rope_parameters)},
        rope_attention_factor=None if geometry.attention_factor == 1 else geometry.attention_factor,
        softmax_scale=geometry.softmax_scale,
        q_bias="q_proj_bias" in biased,
        kv_a_bias="kv_a_proj_with_mqa_bias" in biased,
        o_bias="o_proj_bias" in biased,
        latent_norm="identity",
        latent_code=codes if any(code != codes[0] for code in codes) else codes[0],
        **family_fields,
    )


def _body(source: PreTrainedConfig, mla_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What stays. A field that the source's class does not know has no meaning there; under a name that the converted
    class knows it would get one."""

    def known_only_to(name: str) -> bool:
        return hasattr(mla_class, name) and not hasattr(type(source), name)

    return {
        name: value
        for name, value in source.to_dict().items()
        if passed_on(name) and name not in _REPLACED and not known_only_to(name)
    }
