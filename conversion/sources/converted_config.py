"""From a source's configuration to that of the converted model: the body's fields, and those of its attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..checkpoint.json_fields import passed_on
from ..layers import AttentionGeometry, MLAWeights
from .query_maps import head_dim_of_queries

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
    geometries: Sequence[AttentionGeometry],
    layers: Iterable[MLAWeights],
    dtype: torch.dtype,
    family_fields: dict[str, Any],
) -> PreTrainedConfig:
    """The body of ``source`` with the attention of ``layers``.

    Args:
        source: what the body's fields are taken from.
        mla_class: of the converted family.
        geometries: of the source's layers, which have one softmax scale, and one rotary width or none.
        layers: the converted attention by layer, each asked for once.
        dtype: of the weights.
        family_fields: what the family has beside the common fields.
    """
    ranks, rows, long_rows, codes, biased = [], [], [], [], set()
    nope_dims, v_head_dims = [], set()
    for geometry, weights in zip(geometries, layers, strict=True):
        ranks.append(weights.kv_b_proj.shape[1])
        rows.append(weights.inv_freq.float().tolist())
        codes.append(None if weights.code is None else weights.code.to_dict())
        biased |= {name for name in BIASES if getattr(weights, name) is not None}
        if geometry.long_inv_freq is not None:
            long_rows.append(long_frequencies(weights.inv_freq, geometry.inv_freq, geometry.long_inv_freq).tolist())
        nope_dims.append(weights.qk_nope_head_dim)
        v_head_dims.add(weights.v_head_dim)
    widths = [2 * len(row) for row in rows]
    (v_head_dim,) = v_head_dims
    # A layer without rotary channels has no use for what makes cosines and sines.
    rotating = [geometry for geometry in geometries if geometry.rotary_dim] or geometries
    ((softmax_scale, rotary_dim),) = {(geometry.softmax_scale, geometry.rotary_dim) for geometry in rotating}
    factors = [geometry.attention_factor for geometry in geometries]
    one_factor = len({geometry.attention_factor for geometry in rotating}) == 1
    factor = rotating[0].attention_factor
    alike = all(row == rows[0] for row in rows) and all(row == long_rows[0] for row in long_rows)
    shared = alike and one_factor
    # Where a class has one, a default would stand for it.
    fields = {"attention_bias": False, "latent_bias": "kv_a_proj_with_mqa_bias" in biased}
    family_fields = {name: value for name, value in fields.items() if hasattr(mla_class, name)} | family_fields
    return mla_class(
        **_body(source, mla_class),
        architectures=[mla_class.__name__.removesuffix("Config") + "ForCausalLM"],
        dtype=dtype,
        kv_lora_rank=max(ranks),
        kv_lora_ranks=ranks if len(set(ranks)) > 1 else None,
        q_lora_rank=None,
        q_head_dim=head_dim_of_queries(geometries, list(map(sum, zip(nope_dims, widths, strict=True)))),
        qk_nope_head_dim=max(nope_dims),
        qk_nope_head_dims=nope_dims if len(set(nope_dims)) > 1 else None,
        qk_rope_head_dim=max(widths),
        qk_rope_head_dims=widths if len(set(widths)) > 1 else None,
        v_head_dim=v_head_dim,
        rope_interleave=False,
        rope_inv_freq=rows[:1] if shared else rows,
        rope_long_inv_freq=(long_rows[:1] if shared else long_rows) or None,
        rope_inv_freq_source={"head_dim": rotary_dim, "rope_parameters": deepcopy(source.rope_parameters)},
        rope_attention_factor=None if not one_factor or factor == 1 else factor,
        rope_attention_factors=None if one_factor else factors,
        softmax_scale=softmax_scale,
        q_bias="q_proj_bias" in biased,
        kv_a_bias="kv_a_proj_with_mqa_bias" in biased,
        o_bias="o_proj_bias" in biased,
        latent_norm="identity",
        latent_code=codes if any(code != codes[0] for code in codes) else codes[0],
        **family_fields,
    )


def long_frequencies(chosen: Tensor, short: Tensor, long: Tensor) -> Tensor:
    """What takes the place of rotary frequencies beyond the original context.

    Args:
        chosen: ``[m]``, of the converted layer: the source's own, or (folded) between two of them.
        short: ``[pairs]``, the source's within the original context, descending.
        long: ``[pairs]``, the source's beyond it.

    Returns:
        ``[m]``, float32: for the source's own exactly its long one, between two of them the same share of the way.
    """
    nearest = (chosen[:, None] - short).abs().argmin(-1)
    exact = short[nearest] == chosen
    if exact.all():
        return long[nearest]
    logs, long_logs, wanted = short.double().log().flip(0), long.double().log().flip(0), chosen.double().log()
    upper = torch.searchsorted(logs, wanted).clamp(1, len(logs) - 1)
    share = (wanted - logs[upper - 1]) / (logs[upper] - logs[upper - 1])
    between = torch.lerp(long_logs[upper - 1], long_logs[upper], share).exp().to(long.dtype)
    return torch.where(exact, long[nearest], between)


def _body(source: PreTrainedConfig, mla_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields that stay.

    A field that the source's class does not know has no meaning there; under a name that the converted class knows it
    would get one.
    """

    def known_only_to(name: str) -> bool:
        return hasattr(mla_class, name) and not hasattr(type(source), name)

    return {
        name: value
        for name, value in source.to_dict().items()
        if passed_on(name) and name not in _REPLACED and not known_only_to(name)
    }
