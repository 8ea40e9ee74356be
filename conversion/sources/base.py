"""A source family: where its attention is, what its quirks are, how it becomes an MLA model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

import modeling_mla
from modeling_mla.attention_mla import layer_window
from modeling_mla.configuration_mla import identity_norm_weight

from ..checkpoint.location import Location
from ..errors import SourceError
from ..layers import AttentionGeometry, AttentionWeights, MLAWeights
from .converted_config import BIASES, converted_config
from .inventory import refuse_unfit
from .stored_model import StoredModel

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class SourceModel(StoredModel):
    """One checkpoint of a family; the defaults describe Llama's attention.

    Raises:
        SourceError: on construction, for a feature that the conversion does not support.
    """

    mla_name: ClassVar[str]
    """Of the classes in `modeling_mla`: ``<name>Config``, ``<name>ForCausalLM``."""

    def __init__(self, location: Location, config: PreTrainedConfig) -> None:
        super().__init__(location, config)
        refuse_unfit(location.model, config, self.head_dim)
        self.refuse_unsupported()

    def refuse_unsupported(self) -> None:
        """Raises `SourceError`, with the feature's name, for a configuration that would be converted wrongly.

        Frequencies that depend on the sequence length have no fixed table; the others become one.
        """
        rope = self.config.rope_parameters
        if rope["rope_type"] not in _ROPE_TYPES:
            raise SourceError(
                f"{self.location.model} has rotary scaling {rope['rope_type']!r}, whose frequencies depend on the "
                f"length of the text; supported are {', '.join(_ROPE_TYPES)}."
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise SourceError(
                f"{self.location.model} has partial_rotary_factor {rope['partial_rotary_factor']}, which "
                f"{self.causal_lm.__name__} does not apply; remove it from the configuration."
            )

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def geometry(self, layer: int) -> AttentionGeometry:
        """Sizes, frequencies, scale and window of one layer's attention."""
        inv_freq, attention_factor = self._frequencies
        return AttentionGeometry(
            hidden_size=self.config.hidden_size,
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.head_dim,
            inv_freq=inv_freq,
            softmax_scale=self.head_dim**-0.5,
            attention_factor=attention_factor,
            sliding_window=layer_window(self.config, layer),
        )

    @cached_property
    def _frequencies(self) -> tuple[Tensor, float]:
        try:
            rotary: Any = self.rotary_class(self.config)
        except Exception as error:
            # Transformers' own formulas, on whatever the configuration has.
            raise self._unbuildable(error) from error
        inv_freq, attention_factor = rotary.inv_freq.float(), float(rotary.attention_scaling)
        if not (torch.isfinite(inv_freq).all() and (inv_freq > 0).all() and 0 < attention_factor < float("inf")):
            raise SourceError(
                f"{self.location.model} has rotary frequencies that are not positive numbers; correct rope_parameters "
                f"in its configuration: {dict(self.config.rope_parameters)}."
            )
        return inv_freq, attention_factor

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that all layers of the source together cache for one token."""
        return sum(self.geometry(layer).cache_elements for layer in range(self.num_layers)) * dtype.itemsize

    def attention(self, layer: int, dtype: torch.dtype | None = None) -> AttentionWeights:
        """One layer's attention weights in ``dtype``; by default float32, or float64 where they are stored so."""
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        names = set(self.tensors.names)

        def read(name: str) -> Tensor:
            stored = self.tensors.tensor(prefix + name)
            return stored.to(dtype or torch.promote_types(stored.dtype, torch.float32))

        def read_if_there(name: str) -> Tensor | None:
            return read(name) if prefix + name in names else None

        return AttentionWeights(
            q=read("q_proj.weight"),
            k=read("k_proj.weight"),
            v=read("v_proj.weight"),
            o=read("o_proj.weight"),
            q_bias=read_if_there("q_proj.bias"),
            k_bias=read_if_there("k_proj.bias"),
            v_bias=read_if_there("v_proj.bias"),
            o_bias=read_if_there("o_proj.bias"),
        )

    def attention_input(self, module: nn.Module, hidden_states: Tensor) -> Tensor:
        """What the projections of a decoder layer read, from the hidden states that enter it."""
        return module.get_submodule("input_layernorm")(hidden_states)

    def run_layer(
        self, layer: int, module: nn.Module, hidden_states: Tensor, attention_output: Tensor | None = None
    ) -> Tensor:
        """One decoder layer over windows that start at position 0, ``[B, S, D]`` to ``[B, S, D]``.

        Args:
            attention_output: ``[B, S, D]``, what its attention shall give; None for what it does give.
        """
        if attention_output is not None:
            attention = module.get_submodule(self.attention_prefix.removesuffix("."))
            attention.forward = lambda *_, **__: (attention_output, None)
            try:
                return self.run_layer(layer, module, hidden_states)
            finally:
                del attention.forward
        position_ids = torch.arange(hidden_states.shape[1])[None]
        angles = self.rotary(hidden_states, position_ids)
        mask = sliding_mask(hidden_states.shape[1], self.geometry(layer))
        return module(hidden_states, attention_mask=mask, position_ids=position_ids, position_embeddings=angles)

    def replaced(self, name: str) -> int | None:
        """The layer whose attention the tensor ``name`` belongs to; None for one that passes through."""
        pattern = re.escape(self.layer_prefix).replace(r"\{layer\}", r"(\d+)") + re.escape(self.attention_prefix)
        match = re.match(pattern, name)
        return None if match is None else int(match.group(1))

    def mla_tensors(
        self, layer: int, weights: MLAWeights, config: PreTrainedConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The converted attention under its names in the new checkpoint."""
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        rank = weights.kv_b_proj.shape[1]
        tensors = {
            "q_proj.weight": weights.q_proj.to(dtype),
            "kv_a_proj_with_mqa.weight": weights.kv_a_proj_with_mqa.to(dtype),
            "kv_a_layernorm.weight": identity_norm_weight(rank, dtype),
            "kv_b_proj.weight": weights.kv_b_proj.to(dtype),
            "o_proj.weight": weights.o_proj.to(dtype),
        }
        for field, wanted in zip(BIASES, (config.q_bias, config.kv_a_bias, config.o_bias), strict=True):
            if wanted:
                name, bias = field.removesuffix("_bias"), getattr(weights, field)
                width = tensors[f"{name}.weight"].shape[0]
                tensors[f"{name}.bias"] = torch.zeros(width, dtype=dtype) if bias is None else bias.to(dtype)
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def mla_config(self, layers: Iterable[MLAWeights], dtype: torch.dtype) -> PreTrainedConfig:
        """The configuration of the converted model: the source's body, the layers' attention."""
        mla_class = getattr(modeling_mla, f"{self.mla_name}Config")
        return converted_config(self.config, mla_class, self.geometry(0), layers, dtype, self.family_fields())

    def family_fields(self) -> dict[str, Any]:
        """What the converted configuration of this family says beside the common fields."""
        return {}


def sliding_mask(length: int, geometry: AttentionGeometry) -> Tensor | None:
    """Bool ``[1, 1, S, S]``, True where a query sees a key; None where causality alone decides."""
    if geometry.sliding_window is None or geometry.sliding_window >= length:
        return None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return ((distance >= 0) & (distance < geometry.sliding_window))[None, None]
