"""What every attention layer of a model of this library is, read off the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_mla.attention_mla import MLAttention
from modeling_mla.rope_mla import ByLayerType

from ..errors import SourceError


@dataclass(frozen=True)
class Rotation:
    """The rotary frequencies of one layer: ``inv_freq [d_r/2]``, radians a token, and the factor for cos and sin.

    ``long_inv_freq`` takes their place where a text is longer than the original context; None where nothing does.
    """

    inv_freq: torch.Tensor
    factor: float
    long_inv_freq: torch.Tensor | None = None


def attention_layers(config: PreTrainedConfig) -> tuple[list[MLAttention], list[Rotation]]:
    """The attention of every layer, without weights, and how it rotates.

    Raises:
        SourceError: frequencies depend on the length of the text, so that no list holds them.
    """
    if config.rope_inv_freq is None:
        _refuse_changing(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [module for module in model.modules() if isinstance(module, MLAttention)]
    with torch.device("cpu"):
        rotary = type(model.base_model.rotary_emb)(config)
    if isinstance(rotary, ByLayerType):
        kinds = [config.layer_types[layer] for layer in range(len(layers))]
        return layers, [
            Rotation(getattr(rotary, f"{kind}_inv_freq"), float(getattr(rotary, f"{kind}_attention_scaling")))
            for kind in kinds
        ]
    rows = torch.atleast_2d(rotary.inv_freq)
    short, long = rows.chunk(2) if config.rope_long_inv_freq is not None else (rows, None)
    factors = torch.as_tensor(rotary.attention_scaling, dtype=torch.float64).flatten().expand(len(short))
    found = []
    for layer, attention in enumerate(layers):
        row, width = layer % len(short), attention.qk_rope_head_dim // 2
        longer = None if long is None else long[row, :width]
        found.append(Rotation(short[row, :width], float(factors[row]), longer))
    return layers, found


def _refuse_changing(config: PreTrainedConfig) -> None:
    parameters = config.rope_parameters
    for rope in [parameters] if "rope_type" in parameters else parameters.values():
        if rope["rope_type"] in ("dynamic", "longrope"):
            raise SourceError(
                f"rope_type is {rope['rope_type']!r} without rope_inv_freq, so that frequencies change with the text; "
                "serve the model with Transformers."
            )
