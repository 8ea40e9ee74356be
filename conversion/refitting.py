"""The last pass over the calibration text: it reaches every layer twice, in the source and in the converted model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import ResidualStream
from .checkpoint.measurements import HiddenStates
from .layers import AttentionWeights, MLAWeights
from .methods.attention import converted_output, source_output
from .methods.base import LayerInputs, LayerRefit
from .sources import SourceModel

WINDOWS = 24
"""At most so many are used: a refit has far fewer unknowns than the statistics."""


def spread_windows(count: int, at_most: int) -> Tensor:
    """Indices of at most ``at_most`` of ``count`` windows, evenly spread."""
    return torch.linspace(0, count - 1, min(count, at_most)).round().long()


class Refitting:
    """Refits layer after layer, each behind the converted ones before it.

    Args:
        stream: the text in the source.
        converted: where the hidden states of the converted model are kept. A killed run goes on from those that enter
            the layer it was at.
    """

    def __init__(self, source: SourceModel, stream: ResidualStream, converted: HiddenStates) -> None:
        self.source, self.stream, self.converted = source, stream, converted

    @torch.inference_mode()
    def run(
        self,
        layer: int,
        source_weights: AttentionWeights,
        weights: MLAWeights,
        refit: LayerRefit | None,
    ) -> tuple[MLAWeights, float]:
        """The refitted layer, and the relative squared error of its attention output on the first window.

        The error is for the source's activations. Without a refit nothing else is done.
        """
        source, module = self.source, self.source.decoder_layer(layer)
        entering = self.stream.entering(layer)
        chosen = entering[spread_windows(len(entering), WINDOWS)].float()
        if refit is not None:
            states = chosen if layer == 0 else self.converted.read_hidden_states(layer)
            contexts = [
                refit.update(*(LayerInputs(source.attention_input(module, window), window) for window in pair))
                for pair in zip(chosen, states, strict=True)
            ]
            weights = refit.weights()
            if layer + 1 < source.num_layers:
                self._advance(layer, module, weights, states, contexts)
        geometry, inputs = source.geometry(layer), source.attention_input(module, chosen[0])
        wanted = source_output(geometry, source_weights, inputs)
        found = converted_output(geometry, weights, inputs)
        return weights, float((found - wanted).square().sum() / wanted.square().sum())

    def _advance(
        self, layer: int, module: nn.Module, weights: MLAWeights, states: Tensor, contexts: list[Tensor]
    ) -> None:
        """Moves the converted model's hidden states ``[N, S, D]`` through the layer."""
        moved = []
        for window, context in zip(states, contexts, strict=True):
            output = torch.nn.functional.linear(context, weights.o_proj, weights.o_proj_bias)
            moved.append(self.source.run_layer(layer, module, window[None], output[None]))
        self.converted.write_hidden_states(layer + 1, torch.cat(moved))
