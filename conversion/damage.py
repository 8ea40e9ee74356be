"""How much each layer alone would harm the model: what ranks are handed out by.

An error of one size harms more in some layers than in others, which no statistics of the layer itself tell. So every
layer is converted by itself, and a little of the calibration text runs through the rest of the source.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import run_converted
from .layers import MLAWeights
from .sources import SourceModel

WINDOWS = 2
LENGTH = 256
"""Tokens at the start of each window. On these 512 the damage of a layer is known to about a fifth."""
_ROWS = 128
"""Positions whose distributions over the vocabulary are formed at a time."""


@torch.inference_mode()
def layer_damage(
    source: SourceModel, windows: Tensor, converted: Callable[[int], MLAWeights], step: Callable[[], None]
) -> list[float]:
    """By layer, nats a token: KL to the source of the model in which only that layer is converted.

    All those models run side by side, so that one layer at a time is in memory. A layer's model begins where the layer
    is: before it, it is the source.

    Args:
        windows: token ids ``[N, S]``.
        converted: a layer's converted attention.
        step: called after each layer.
    """
    stream = source.embed(windows)
    harmed: list[Tensor] = []
    for layer in range(source.num_layers):
        module = source.decoder_layer(layer)
        harmed = [source.run_layer(layer, module, states) for states in harmed]
        harmed.append(run_converted(source, layer, module, stream, converted(layer)))
        stream = source.run_layer(layer, module, stream)
        step()
    sums = [0.0] * len(harmed)
    predict = source.predictor()
    for rows in torch.arange(windows.numel()).split(_ROWS):
        expected = predict(stream.flatten(0, 1)[rows]).log_softmax(-1)
        for layer, states in enumerate(harmed):
            found = predict(states.flatten(0, 1)[rows]).log_softmax(-1)
            sums[layer] += float((expected.exp() * (expected - found)).sum())
    return [total / windows.numel() for total in sums]
