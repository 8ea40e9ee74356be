"""A model as its checkpoint holds it: where its tensors are, and its own modules with their weights in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy, deepcopy
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.gguf_reader import GGUFTensorReader
from ..checkpoint.location import Location, locate
from ..checkpoint.model_reader import ModelTensors, as_held
from ..checkpoint.reader import SafetensorsReader, TensorReader
from ..devices.choice import CPU
from ..errors import SourceError, first_line
from .inventory import account_for_all, reading_order
from .stored_linear import StoredLinear


class StoredModel:
    """One checkpoint of a family. Reads tensors one layer at a time; the defaults are Llama's names.

    ``device`` is where the modules and tensors lie that it gives, and hidden states have to; see `on`.
    """

    model_type: ClassVar[str]
    causal_lm: ClassVar[type[PreTrainedModel]]
    decoder_layer_class: ClassVar[type[nn.Module]]
    rotary_class: ClassVar[type[nn.Module]]
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
        self.device = CPU
        config._attn_implementation = "sdpa" if self.causal_lm._supports_sdpa else "eager"

    def on(self, device: torch.device) -> Self:
        """The same checkpoint for that device; what has been opened of it is shared."""
        if device == self.device:
            return self
        moved = copy(self)
        moved.device = device
        return moved

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return self.config.num_hidden_layers

    @property
    def chooses_experts(self) -> bool:
        """Whether the model has experts, a few of which serve a token."""
        return hasattr(type(self.config), "num_experts_per_tok")

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored as; float32 for a GGUF, whose tensors are dequantised."""
        if self.location.gguf_file is not None:
            return torch.float32
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        self.held_tensors.require_weights(self.embedding)
        return self.held_tensors.dtype(self.embedding)

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
        """The weights as they are stored. Raises `SourceError` where tensors are missing, misshapen, or unknown."""
        location = self.location
        if location.revision is not None:
            # Until here only the configuration was fetched.
            location = locate(f"{location.name}@{location.revision}")
        if location.gguf_file is not None and self.chooses_experts:
            raise SourceError(
                f"{location.model} is a GGUF of a model with experts, which lie there otherwise than is read; convert "
                "the safetensors checkpoint instead."
            )
        if location.gguf_file is not None:
            reader: TensorReader = GGUFTensorReader(location, self.meta_model)
        else:
            reader = SafetensorsReader(location.folder, getattr(self.config, "transformers_weights", None))
        held = as_held(reader, self.meta_model)
        account_for_all(location.model, held, self.meta_model, self._read_by_model(held), self.replaced)
        return reader

    @cached_property
    def held_tensors(self) -> TensorReader:
        """The weights as the model holds them, which may merge several of `tensors` (experts). Raises as `tensors`."""
        return as_held(self.tensors, self.meta_model)

    def placed(self, name: str) -> Tensor:
        """A tensor of `held_tensors` on the device, in float32."""
        return self.held_tensors.tensor(name).to(self.device, torch.float32)

    def without_weights(self) -> Self:
        """The same model, whose tensors are those of `meta_model`: what they are like, without a file being read."""
        bare = copy(self)
        bare.tensors = bare.held_tensors = ModelTensors(self.meta_model)
        bare.device = torch.device("meta")
        return bare

    def held_names(self) -> list[str]:
        """Every tensor of `held_tensors` that the model reads."""
        return self._read_by_model(self.held_tensors)

    def _read_by_model(self, reader: TensorReader) -> list[str]:
        return [name for name in reader.names if not re.fullmatch(self.ignored, name)]

    def stored_names(self) -> list[str]:
        """Every tensor of the checkpoint in reading order: layer 2 before layer 10."""
        return sorted(self._read_by_model(self.tensors), key=reading_order)

    def decoder_layer(self, layer: int) -> nn.Module:
        """The family's own decoder layer with its weights, in float32, for running the calibration text."""
        prefix = self.layer_prefix.format(layer=layer)
        with torch.device("meta"):
            module = self.decoder_layer_class(self.config, layer)
        names = [name for name in self.held_names() if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.placed(name) for name in names}
        module.load_state_dict(weights, assign=True)
        return module.eval().requires_grad_(False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """``[B, S]`` token ids on the CPU to the hidden states ``[B, S, D]`` that enter layer 0, float32."""
        return self.held_tensors.rows(self.embedding, input_ids).to(self.device, torch.float32)

    def final_norm_module(self) -> nn.Module:
        """The norm behind the last layer with its weights, in float32."""
        norm = deepcopy(self.meta_model.get_submodule(self.final_norm))
        parameters = {name: self.placed(f"{self.final_norm}.{name}") for name in norm.state_dict()}
        norm.load_state_dict(parameters, assign=True)
        return norm

    def predictor(self) -> Callable[[Tensor], Tensor]:
        """What makes logits ``[..., V]`` of the hidden states ``[..., D]`` that leave the last layer, float32."""
        norm = self.final_norm_module()
        head = StoredLinear(self.held_tensors.tensor(self.stored_head).to(self.device))
        return lambda states: self.logits(head(norm(states)))

    @property
    def stored_head(self) -> str:
        """The tensor of `held_tensors` that makes logits, whatever tie_word_embeddings says: as Transformers does."""
        return self.head if self.head in self.held_tensors.names else self.embedding

    def logits(self, products: Tensor) -> Tensor:
        """What the model makes of its head's products ``[..., V]``."""
        return products

    def replaced(self, name: str) -> int | None:
        """The layer whose attention the tensor ``name`` belongs to; None for one that passes through."""
        pattern = re.escape(self.layer_prefix).replace(r"\{layer\}", r"(\d+)") + re.escape(self.attention_prefix)
        match = re.match(pattern, name)
        return None if match is None else int(match.group(1))

    def in_layer(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to a decoder layer."""
        return name.startswith(self.layer_prefix.partition("{")[0])

    def _unbuildable(self, error: Exception) -> SourceError:
        return SourceError(
            f"{self.location.model} has a configuration of which Transformers makes no model "
            f"({type(error).__name__}: {first_line(error)})."
        )
