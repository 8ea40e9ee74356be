"""A source family: where its attention is, what its quirks are, how it becomes an MLA model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from typing_extensions import override

import modeling_mla
from modeling_mla.attention_mla import layer_window
from modeling_mla.configuration_mla import identity_norm_weight
from modeling_mla.transformers_seams_mla import ROPE_INIT_FUNCTIONS

from ..checkpoint.location import Location
from ..devices.choice import CPU
from ..errors import SourceError
from ..layers import AttentionGeometry, AttentionWeights, MLAWeights
from .converted_config import BIASES, converted_config
from .given_output import GivenOutput
from .inventory import refuse_rotation, refuse_unfit
from .masks import layer_mask
from .query_maps import head_maps
from .rotary_layout import half_split
from .stored_model import StoredModel


class SourceModel(StoredModel):
    """One checkpoint of a family; the defaults describe Llama's attention.

    Raises:
        SourceError: on construction, for a feature that the conversion does not support.
    """

    mla_name: ClassVar[str]
    """Of the classes in `modeling_mla`: ``<name>Config``, ``<name>ForCausalLM``."""
    models: ClassVar[str]
    """Released models of the family, by the names that users know."""
    fused_projection: ClassVar[str | None] = None
    """The projection that makes queries, keys and values at once, which `split_fused` takes apart."""
    output_projection: ClassVar[str] = "o_proj"
    input_norm: ClassVar[str | None] = "input_layernorm"
    """Of a layer, before its attention; None where there is none."""
    interleaved: ClassVar[bool] = False
    """Whether rotary pairs are channels ``(2f, 2f+1)``, not ``(f, f + d/2)``."""
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3", "yarn", "longrope")
    rotates_partly: ClassVar[bool] = False
    """Whether the family reads ``partial_rotary_factor``."""

    def __init__(self, location: Location, config: PreTrainedConfig) -> None:
        super().__init__(location, config)
        refuse_unfit(location.model, config, self.head_dim, self.num_kv_heads)
        self.refuse_unsupported()

    @override
    def on(self, device: torch.device) -> Self:
        moved = super().on(device)
        if moved is not self:
            moved.__dict__.pop("rotary", None)
        return moved

    def refuse_unsupported(self) -> None:
        """Raises `SourceError`, with the feature's name, for a configuration that would be converted wrongly.

        Frequencies that depend on the sequence length have no fixed table; the others become one, or two (longrope).
        """
        name, model = self.location.model, self.causal_lm.__name__
        refuse_rotation(name, model, self.rope_parameters, self.rope_types, partly=self.rotates_partly)

    @property
    def rope_parameters(self) -> list[dict[str, Any]]:
        """Every set of parameters by which layers rotate."""
        return [self.config.rope_parameters]

    @property
    def head_dim(self) -> int:
        """Channels of a head: what the configuration says, else the hidden size divided among the query heads."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """One for each query head where the family's configuration knows no such field."""
        known = hasattr(type(self.config), "num_key_value_heads")
        return self.config.num_key_value_heads if known else self.config.num_attention_heads

    @property
    def context(self) -> int:
        """Tokens for which one set of rotary frequencies serves."""
        longest, longrope = self.config.max_position_embeddings, self._longrope
        return longest if longrope is None else min(longest, longrope["original_max_position_embeddings"])

    def geometry(self, layer: int) -> AttentionGeometry:
        """Sizes, frequencies, scale and window of one layer's attention."""
        inv_freq, attention_factor = self._frequencies(layer)
        return AttentionGeometry(
            hidden_size=self.config.hidden_size,
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            inv_freq=inv_freq,
            softmax_scale=self.head_dim**-0.5,
            attention_factor=attention_factor,
            sliding_window=layer_window(self.config, layer),
            long_inv_freq=self._long_frequencies(layer),
        )

    @cached_property
    def rotary(self) -> Any:
        """The family's own rotary module; frequencies do not depend on the device, as they are made on the CPU."""
        try:
            with CPU:
                return self.rotary_class(self.config).to(self._frequency_device)
        except Exception as error:
            # Transformers' own formulas, on whatever the configuration has.
            raise self._unbuildable(error) from error

    @property
    def _frequency_device(self) -> torch.device:
        """The source's; one without weights has frequencies all the same."""
        return CPU if self.device.type == "meta" else self.device

    def layer_rotary(self, layer: int) -> tuple[Tensor, float]:
        """Inverse frequencies ``[d_r/2]`` of a layer, and the factor for its cosines and sines, from `rotary`."""
        # What a longer text has left in the module is in the other table.
        return self.rotary.original_inv_freq, self.rotary.attention_scaling

    def layer_angles(self, layer: int, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, S, d_r]`` of a layer at ``position_ids [B, S]``, from `rotary`."""
        return self.rotary(hidden_states, position_ids)

    def _long_frequencies(self, layer: int) -> Tensor | None:
        short, longrope = self._frequencies(layer)[0], self._longrope
        if longrope is None or not short.numel():
            return None
        if not (short.diff() < 0).all():
            raise SourceError(
                f"{self.location.model} has a short_factor whose frequencies do not descend, so that it cannot be told "
                "which of long_factor's take their places in longer texts; correct rope_parameters."
            )
        beyond = longrope["original_max_position_embeddings"] + 1
        inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](self.config, CPU, seq_len=beyond)
        return self._sound(inv_freq.float().to(self._frequency_device))

    @property
    def _longrope(self) -> dict[str, Any] | None:
        return next((rope for rope in self.rope_parameters if rope["rope_type"] == "longrope"), None)

    def _frequencies(self, layer: int) -> tuple[Tensor, float]:
        inv_freq, attention_factor = self.layer_rotary(layer)
        return self._sound(inv_freq.float(), float(attention_factor)), float(attention_factor)

    def _sound(self, inv_freq: Tensor, attention_factor: float = 1.0) -> Tensor:
        if not (torch.isfinite(inv_freq).all() and (inv_freq > 0).all() and 0 < attention_factor < float("inf")):
            raise SourceError(
                f"{self.location.model} has rotary frequencies that are not positive numbers; correct rope_parameters "
                f"in its configuration: {dict(self.config.rope_parameters)}."
            )
        return inv_freq

    def cache_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that all layers cache for one token; None is the source's own type, see `cache_dtype`."""
        elements = sum(self.geometry(layer).cache_elements for layer in range(self.num_layers))
        return elements * (dtype or self.cache_dtype).itemsize

    @property
    def cache_dtype(self) -> torch.dtype:
        """What the source keeps its cache in: its own type, for a GGUF bfloat16."""
        return self.dtype if self.location.gguf_file is None else torch.bfloat16

    def attention(self, layer: int, dtype: torch.dtype | None = None) -> AttentionWeights:
        """One layer's attention weights in ``dtype``; by default float32, or float64 where one of them is stored so."""
        weights = self.attention_maps(layer, dtype)
        return half_split(self.geometry(layer), weights) if self.interleaved else weights

    def attention_maps(self, layer: int, dtype: torch.dtype | None) -> AttentionWeights:
        """As `attention`, rotary pairs where the source has them."""
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        inputs = ("q_proj", "k_proj", "v_proj") if self.fused_projection is None else (self.fused_projection,)
        projections = (*inputs, self.output_projection)
        wanted = {f"{prefix}{name}.{kind}" for name in projections for kind in ("weight", "bias")}
        names = wanted & set(self.held_tensors.names)
        common = dtype or reduce(torch.promote_types, map(self.held_tensors.dtype, names), torch.float32)

        def read(name: str) -> Tensor:
            return self.held_tensors.tensor(prefix + name).to(self.device, common)

        def parts(kind: str) -> dict[str, Tensor | None]:
            found = [read(f"{name}.{kind}") if f"{prefix}{name}.{kind}" in names else None for name in projections]
            output = found.pop()
            if self.fused_projection is not None:
                found = [None, None, None] if found[0] is None else list(self.split_fused(found[0]))
            return dict(zip("qkvo", (*found, output), strict=True))

        weights: dict[str, Any] = {**parts("weight"), **{f"{name}_bias": bias for name, bias in parts("bias").items()}}
        return AttentionWeights(**weights)

    def split_fused(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values from the rows of `fused_projection`; here they lie one below the other.

        ``rows`` are those of its weight ``[n, D]`` or of its bias ``[n]``.
        """
        queries, keys = self.config.num_attention_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return rows[:queries], rows[queries : queries + keys], rows[queries + keys :]

    def attention_input(self, module: nn.Module, hidden_states: Tensor) -> Tensor:
        """What the projections of a layer read ``[B, S, w]``, from the hidden states ``[B, S, D]`` that enter it."""
        return hidden_states if self.input_norm is None else module.get_submodule(self.input_norm)(hidden_states)

    def run_layer(
        self, layer: int, module: nn.Module, hidden_states: Tensor, attention_output: Tensor | None = None
    ) -> Tensor:
        """One decoder layer over windows that start at position 0, ``[B, S, D]`` to ``[B, S, D]``.

        Args:
            layer: its index, by which it rotates and has a window or none.
            module: what `decoder_layer` gives for it.
            hidden_states: ``[B, S, D]``, what enters it.
            attention_output: ``[B, S, D]``, what its attention shall give; None for what it does give.
        """
        length, device = hidden_states.shape[1], hidden_states.device
        position_ids = torch.arange(length, device=device)[None]
        angles = self.layer_angles(layer, hidden_states, position_ids)
        mask = layer_mask(length, self.geometry(layer), additive=not self.causal_lm._supports_sdpa, device=device)
        attention = nullcontext() if attention_output is None else self._giving(module, attention_output)
        with attention:
            return module(hidden_states, attention_mask=mask, position_ids=position_ids, position_embeddings=angles)

    @contextmanager
    def _giving(self, module: nn.Module, attention_output: Tensor) -> Iterator[None]:
        """A decoder layer whose attention gives this."""
        name = self.attention_prefix.removesuffix(".")
        attention = module.get_submodule(name)
        module.set_submodule(name, GivenOutput(attention_output))
        try:
            yield
        finally:
            module.set_submodule(name, attention)

    def mla_tensors(
        self, layer: int, weights: MLAWeights, config: PreTrainedConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The converted attention under its names in the new checkpoint."""
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        rank = weights.kv_b_proj.shape[1]
        by_head = {}
        if config.q_head_dim is not None:
            source = self.attention(layer)
            by_head["q_head_proj.weight"] = head_maps(source, weights, config.num_attention_heads).to(dtype)
            weights = replace(weights, q_proj=source.q, q_proj_bias=source.q_bias)
        tensors = {
            "q_proj.weight": weights.q_proj.to(dtype),
            "kv_a_proj_with_mqa.weight": weights.kv_a_proj_with_mqa.to(dtype),
            "kv_a_layernorm.weight": identity_norm_weight(rank, dtype, weights.kv_b_proj.device),
            "kv_b_proj.weight": weights.kv_b_proj.to(dtype),
            "o_proj.weight": weights.o_proj.to(dtype),
        }
        for field, wanted in zip(BIASES, (config.q_bias, config.kv_a_bias, config.o_bias), strict=True):
            if wanted:
                name, bias = field.removesuffix("_bias"), getattr(weights, field)
                rows = tensors[f"{name}.weight"]
                tensors[f"{name}.bias"] = rows.new_zeros(len(rows)) if bias is None else bias.to(dtype)
        return {prefix + name: tensor for name, tensor in (tensors | by_head).items()}

    def mla_config(self, layers: Iterable[MLAWeights], dtype: torch.dtype) -> PreTrainedConfig:
        """The configuration of the converted model: the source's body, the layers' attention."""
        mla_class = getattr(modeling_mla, f"{self.mla_name}Config")
        # What is written lies on the CPU.
        source = self.on(CPU)
        geometries = [source.geometry(layer) for layer in range(self.num_layers)]
        return converted_config(self.config, mla_class, geometries, layers, dtype, self.family_fields())

    def family_fields(self) -> dict[str, Any]:
        """What the converted configuration of this family says beside the common fields."""
        return {}
