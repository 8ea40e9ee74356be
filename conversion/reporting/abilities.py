"""What can be done with a model: converted exactly, compressed, served where; and if not, why not."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from modeling_mla.vllm_mla import refuse_unservable

from ..methods import Method, get_method
from ..planning.exact_form import exact_config
from ..recipe import Recipe
from ..sources import SourceModel, is_mla

_COMPRESSING = Recipe.model_fields["method"].default


def abilities_of(source: SourceModel) -> dict[str, str]:
    """Of a model that can be converted."""
    geometries = [source.geometry(layer) for layer in range(source.num_layers)]
    whole = sum(geometry.cache_elements for geometry in geometries)

    def share(method: Method) -> str:
        return f"{sum(method.smallest(geometry).cache_elements for geometry in geometries) / whole:.1%}"

    return {
        "exact": f"yes, at {share(get_method('exact'))} of the source's cache",
        "compressed": f"yes, down to {share(get_method(_COMPRESSING))} of it; what that costs is measured",
        **serving(exact_config(source, torch.bfloat16)),
    }


def without_conversion(config: PreTrainedConfig, reason: str) -> dict[str, str]:
    """Of a model that is not converted, for ``reason``, which a refusal gave."""
    if hasattr(config, "kv_lora_ranks"):
        return {"conversion": f"no: {reason}", **serving(config)}
    if is_mla(config):
        return {"conversion": f"no: {reason}", "fast decode": "by enable_absorbed_attention(model), where it fits"}
    return {"conversion": f"no: {reason}"}


def serving(config: PreTrainedConfig) -> dict[str, str]:
    """Where a model of this library can be served."""
    try:
        refuse_unservable(config, config.max_position_embeddings, torch.bfloat16)
    except ValueError as error:
        return {"in Transformers": "yes", "in vLLM": f"no: {error}"}
    return {"in Transformers": "yes", "in vLLM": "by our plugin, padded by mla export to widths that it has"}
