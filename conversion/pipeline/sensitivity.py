"""How sensitive the model is to the conversion of each layer: what ranks are handed out by.

An error of one size harms more in some layers than in others, which no statistics of the layer itself tell. So every
layer is converted by itself, and a little of the calibration text runs through the rest of the source.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..evaluation.scores import kl_divergence
from ..forward.residual_stream import run_converted
from ..layers import MLAWeights
from ..sources import SourceModel


@torch.inference_mode()
def layer_sensitivity(
    source: SourceModel, windows: Tensor, converted: Callable[[int], MLAWeights], step: Callable[[], None]
) -> list[float]:
    """By layer, the KL to the source, in nats a token, of the model in which only that layer is converted.

    All those models run side by side, so that one layer at a time is in memory. A layer's model begins where the layer
    is: before it, it is the source.

    Args:
        source: the model to be converted.
        windows: token ids ``[N, S]``.
        converted: a layer's converted attention.
        step: called after each layer.
    """
    stream = source.embed(windows)
    changed: list[Tensor] = []
    for layer in range(source.num_layers):
        module = source.decoder_layer(layer)
        changed = [source.run_layer(layer, module, states) for states in changed]
        changed.append(run_converted(source, layer, module, stream, converted(layer)))
        stream = source.run_layer(layer, module, stream)
        step()
    predict = source.predictor()
    expected = predict(stream)
    return [float(kl_divergence(expected, predict(states))) for states in changed]
