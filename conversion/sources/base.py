"""A source family: where its attention is, what its quirks are, how it becomes an MLA model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import modeling_mla
from modeling_mla.attention_mla import layer_window
from modeling_mla.configuration_mla import identity_norm_weight

from ..checkpoint.gguf_reader import GGUFTensorReader
from ..checkpoint.location import Location, locate
from ..checkpoint.reader import SafetensorsReader, TensorReader
from ..errors import SourceError, first_line
from ..layers import AttentionGeometry, AttentionWeights, MLAWeights
from .converted_config import BIASES, converted_config
from .given_output import GivenOutput
from .inventory import account_for_all, reading_order, refuse_unfit

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class SourceModel:
    """One checkpoint of a family. Reads tensors one layer at a time; the defaults describe Llama's naming.

    Raises:
        SourceError: on construction, for a feature that the conversion does not support.
    """

    model_type: ClassVar[str]
    causal_lm: ClassVar[type[PreTrainedModel]]
    decoder_layer_class: ClassVar[type[nn.Module]]
    rotary_class: ClassVar[type[nn.Module]]
    mla_name: ClassVar[str]
    """Of the classes in `modeling_mla`: ``<name>Config``, ``<name>ForCausalLM``."""
    latent_bias: ClassVar[bool] = True
    """Whether their attention may have a bias in front of the latent."""

    layer_prefix: ClassVar[str] = "model.layers.{layer}."
    attention_prefix: ClassVar[str] = "self_attn."
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    final_norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head.weight"
    ignored: ClassVar[str] = r".*\.rotary_emb\.inv_freq"
    """Tensors that old checkpoints carry and Transformers does not read."""

    def __init__(self, location: Location, config: PreTrainedConfig) -> None:
        self.location = location
        self.config = config
        config._attn_implementation = "sdpa"
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
            latent_bias=self.latent_bias,
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

    def _unbuildable(self, error: Exception) -> SourceError:
        return SourceError(
            f"{self.location.model} has a configuration of which Transformers makes no model "
            f"({type(error).__name__}: {first_line(error)})."
        )

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored as; float32 for a GGUF, whose tensors are dequantised."""
        if self.location.gguf_file is not None:
            return torch.float32
        stated = self.config.dtype
        return stated if isinstance(stated, torch.dtype) else self.tensors.dtype(self.embedding)

    def cache_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that all layers cache for one token; None is the source's own type, for a GGUF bfloat16."""
        dtype = dtype or (self.dtype if self.location.gguf_file is None else torch.bfloat16)
        return sum(self.geometry(layer).cache_elements for layer in range(self.num_layers)) * dtype.itemsize

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The Transformers model without weights: what tensors there must be."""
        try:
            with torch.device("meta"):
                return self.causal_lm(self.config)
        except Exception as error:
            # Whatever a wrong field leads to, an unknown activation for one.
            raise self._unbuildable(error) from error

    @cached_property
    def tensors(self) -> TensorReader:
        """The weights. Raises `SourceError` where tensors are missing, misshapen, or unknown."""
        location = self.location
        if location.revision is not None:
            # Until here only the configuration was fetched.
            location = locate(f"{location.name}@{location.revision}")
        if location.gguf_file is not None:
            reader: TensorReader = GGUFTensorReader(location, self.meta_model)
        else:
            reader = SafetensorsReader(location.folder, getattr(self.config, "transformers_weights", None))
        account_for_all(location.model, reader, self.meta_model, self._read_by_model(reader))
        return reader

    def _read_by_model(self, reader: TensorReader) -> list[str]:
        return [name for name in reader.names if not re.fullmatch(self.ignored, name)]

    def stored_names(self) -> list[str]:
        """Every tensor of the checkpoint in reading order: layer 2 before layer 10."""
        return sorted(self._read_by_model(self.tensors), key=reading_order)

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

    def decoder_layer(self, layer: int) -> nn.Module:
        """The family's own decoder layer with its weights, in float32, for running the calibration text."""
        prefix = self.layer_prefix.format(layer=layer)
        with torch.device("meta"):
            module = self.decoder_layer_class(self.config, layer)
        names = [name for name in self.stored_names() if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.tensors.tensor(name).float() for name in names}
        module.load_state_dict(weights, assign=True)
        return module.eval().requires_grad_(False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """``[B, S]`` token ids to the hidden states ``[B, S, D]`` that enter layer 0, float32."""
        return self.tensors.tensor(self.embedding)[input_ids].float()

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
        position_ids = torch.arange(hidden_states.shape[1])[None]
        angles = self.rotary(hidden_states, position_ids)
        mask = sliding_mask(hidden_states.shape[1], self.geometry(layer))
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

    def final_norm_module(self) -> nn.Module:
        """The norm behind the last layer with its weights, in float32."""
        norm = deepcopy(self.meta_model.get_submodule(self.final_norm))
        parameters = {name: self.tensors.tensor(f"{self.final_norm}.{name}").float() for name in norm.state_dict()}
        norm.load_state_dict(parameters, assign=True)
        return norm

    def predictor(self) -> Callable[[Tensor], Tensor]:
        """What makes logits ``[..., V]`` of the hidden states ``[..., D]`` that leave the last layer, float32."""
        norm = self.final_norm_module()
        # A head that is stored is used whatever tie_word_embeddings says, as by Transformers.
        head = self.tensors.tensor(self.head if self.head in self.tensors.names else self.embedding).float()
        return lambda states: torch.nn.functional.linear(norm(states), head)

    @cached_property
    def rotary(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosines and sines of the family's own rotary module."""
        return self.rotary_class(self.config)

    def in_layer(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to a decoder layer."""
        return name.startswith(self.layer_prefix.partition("{")[0])

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
