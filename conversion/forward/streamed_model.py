"""A causal model of Transformers that reads its weights when they are used, one decoder layer at a time.

Whatever surrounds the layers (embedding, masks, angles, final norm, head) is the model's own code too: its ``forward``
runs with other layers in place of its own, which note what they are called with, or give what the layers gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_mla.cache_mla import LatentCache
from modeling_mla.configuration_mla import is_coded
from modeling_mla.transformers_seams_mla import cache_argument

from ..checkpoint.reader import TensorReader
from ..devices.choice import CPU
from ..sources import SourceModel
from ..sources.stored_linear import StoredLinear


class StreamedModel:
    """Computes in float32, as the model would if it were loaded whole; attention reads a coded cache where it has one.

    Args:
        family: names the layers, the embedding and the head; all is computed on its device.
        model: on the meta device; what it needs is put into it and taken out again.
        weights: gives its tensors.
    """

    def __init__(self, family: SourceModel, model: PreTrainedModel, weights: TensorReader) -> None:
        self._family, self._model, self._weights = family, model.eval(), weights
        body: Any = model.base_model
        # On the meta device its frequencies have no values.
        with CPU:
            body.rotary_emb = type(body.rotary_emb)(body.config).to(family.device)
        self._layers = [model.get_submodule(self._prefix(layer)[:-1]) for layer in range(family.num_layers)]
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def enter(self, windows: Tensor) -> list[Tensor]:
        """The hidden states ``[1, S, D]`` that enter layer 0, of each of the windows of token ids ``[N, S]``."""
        entering: list[Tensor] = []

        def note(layer: int, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if layer == 0:
                entering.append(states)
            self._calls[layer] = (args, kwargs)
            return states

        # The rows of the tokens that occur, and the tokens by their place among these.
        tokens, places = windows.unique(return_inverse=True)
        embedding = self._model.get_input_embeddings()
        all_rows = embedding.weight
        self._fill_buffers(embedding)
        embedding.weight = _frozen(self._placed(self._weights.rows(self._family.embedding, tokens)))
        with self._final_norm(), self._other_layers(note):
            for row in places.to(self._family.device):
                self._model.base_model(row[None], use_cache=False, return_dict=True)
        embedding.to("meta")
        embedding.weight = all_rows
        return entering

    @contextmanager
    def layer(self, layer: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """One decoder layer, ``[1, S, D]`` to ``[1, S, D]``, for windows of the length that `enter` has seen last."""
        module = self._layers[layer]
        args, kwargs = self._calls[layer]
        with self._loaded(module, self._prefix(layer)):
            yield lambda states: module(states, *args, **kwargs | self._cache())

    def _cache(self) -> dict[str, Any]:
        """What a window is cached in, as an argument of a layer; nothing where caching changes nothing."""
        config = self._model.config
        return cache_argument(LatentCache(config=config)) if is_coded(config) else {}

    def attention(self, layer: int) -> nn.Module:
        """The attention of a layer, whose weights are there within `layer`."""
        return self._layers[layer].get_submodule(self._family.attention_prefix[:-1])

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes logits ``[n, V]`` of hidden states ``[1, n, D]`` that leave the last layer."""
        weights, family = self._weights, self._family
        original = self._model.get_output_embeddings()
        stored = weights.tensor(family.head if family.head in weights.names else family.embedding)
        self._model.set_output_embeddings(StoredLinear(stored.to(family.device)))

        def logits(states: Tensor) -> Tensor:
            with self._other_layers(lambda *_, **__: states):
                return self._model(inputs_embeds=states, use_cache=False, return_dict=True).logits[0]

        try:
            with self._final_norm():
                yield logits
        finally:
            self._model.set_output_embeddings(original)

    def _fill_buffers(self, module: nn.Module) -> None:
        """Gives a module the buffers that no checkpoint holds (a factor of the embedding), as its model makes them."""
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.empty_like(module.get_buffer(name), device=self._family.device))
        self._model._init_weights(module)

    def _placed(self, stored: Tensor) -> Tensor:
        return stored.to(self._family.device, torch.float32)

    def _prefix(self, layer: int) -> str:
        return self._family.layer_prefix.format(layer=layer)

    def _final_norm(self):
        name = self._family.final_norm
        return self._loaded(self._model.get_submodule(name), f"{name}.")

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str) -> Iterator[None]:
        values = {name: self._placed(self._weights.tensor(prefix + name)) for name in module.state_dict()}
        module.load_state_dict(values, assign=True)
        module.requires_grad_(False)
        try:
            yield
        finally:
            module.to("meta")

    @contextmanager
    def _other_layers(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Within it every layer does ``forward``, which is given its index first."""
        for index, layer in enumerate(self._layers):
            layer.forward = lambda *args, index=index, **kwargs: forward(index, *args, **kwargs)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
