"""What the attention of one checkpoint has beside the plain kind, told by its configuration and its geometry."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ..layers import AttentionGeometry
from ..sources import SourceModel

_MULTIPLIERS = (
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "final_logit_softcapping",
)
"""Fields by which families multiply what other models take as it is."""
_EXPERTS = ("num_local_experts", "num_experts")


def quirks_of(source: SourceModel) -> list[str]:
    """One phrase a quirk; none for attention like that of Llama 2."""
    geometries = [source.geometry(layer) for layer in range(source.num_layers)]
    return [
        *_windows(geometries),
        *_scores(geometries),
        *_rotation(source, geometries),
        *_projections(source, geometries[0]),
        *_body(source),
    ]


def _windows(geometries: list[AttentionGeometry]) -> list[str]:
    counted = Counter(geometry.sliding_window for geometry in geometries)
    del counted[None]
    return [f"a window of {window} tokens in {_share(count, geometries)}" for window, count in counted.items()]


def _scores(geometries: list[AttentionGeometry]) -> list[str]:
    first = geometries[0]
    found = [] if first.softcap is None else [f"scores capped at {first.softcap:g}"]
    if first.softmax_scale != first.head_dim**-0.5:
        found.append(f"scores multiplied by {first.softmax_scale:.4g}")
    return found


def _rotation(source: SourceModel, geometries: list[AttentionGeometry]) -> list[str]:
    found, head_dim = [], geometries[0].head_dim
    still = sum(not geometry.rotary_dim for geometry in geometries)
    widest = max(geometry.rotary_dim for geometry in geometries)
    if still:
        found.append(f"no rotation in {_share(still, geometries)}")
    if 0 < widest < head_dim:
        found.append(f"{widest} of {head_dim} channels rotated")
    if source.interleaved:
        found.append("interleaved rotary pairs")
    kinds = {(rope["rope_type"], rope.get("factor"), rope.get("rope_theta")): rope for rope in source.rope_parameters}
    if len({base for _, _, base in kinds}) > 1:
        found.append(f"rotary bases {' and '.join(f'{base:.0f}' for _, _, base in kinds)}")
    for kind, factor, _ in kinds:
        if kind != "default":
            found.append(f"rotary scaling {kind}{f' by {factor:g}' if factor else ''}")
    return found


def _projections(source: SourceModel, geometry: AttentionGeometry) -> list[str]:
    with torch.device("meta"):
        layer = source.decoder_layer_class(source.config, 0)
    prefix = source.attention_prefix
    names = [name.removeprefix(prefix) for name in layer.state_dict() if name.startswith(prefix)]
    biased = [name.removesuffix(".bias") for name in names if name.endswith(".bias") and "norm" not in name]
    found = ["attention sinks"] if "sinks" in names else []
    if geometry.behind_norms:
        found.append("query and key norms")
    if source.fused_projection is not None:
        found.append(f"queries, keys and values from {source.fused_projection}")
    if geometry.output_is_normed:
        found.append("a norm behind the attention")
    return [*found, *([f"biases on {', '.join(biased)}"] if biased else [])]


def _body(source: SourceModel) -> list[str]:
    config: Any = source.config
    values = {name: getattr(config, name) for name in _MULTIPLIERS if hasattr(type(config), name)}
    found = [f"{name} {value:g}" for name, value in values.items() if value not in (None, 1)]
    if source.chooses_experts:
        count = next(getattr(config, name) for name in _EXPERTS if hasattr(config, name))
        found.append(f"{count} experts, {config.num_experts_per_tok} for a token")
    return found


def _share(count: int, geometries: list[AttentionGeometry]) -> str:
    return "every layer" if count == len(geometries) else f"{count} of {len(geometries)} layers"
