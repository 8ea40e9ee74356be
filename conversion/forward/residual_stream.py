"""The calibration text on its way through the source model or a converted one, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..devices.processes import Processes
from ..layers import MLAWeights
from ..sources import SourceModel
from .attention import converted_output
from .hidden_states import BLOCK, HiddenStates

Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a window's place in the text, attention input and residual stream, ``[1, S, D]`` each, float32."""


def stream_dtype(source: SourceModel) -> torch.dtype:
    """What hidden states are kept in between layers: bfloat16 where the model itself would keep them so."""
    return torch.bfloat16 if source.dtype == torch.bfloat16 else torch.float32


def run_converted(
    source: SourceModel, layer: int, module: nn.Module, hidden_states: Tensor, weights: MLAWeights
) -> Tensor:
    """A decoder layer of the source with its attention converted, over windows that start at position 0.

    Args:
        source: the model before the conversion.
        layer: index of the decoder layer.
        module: that layer of the source, from `SourceModel.decoder_layer`.
        hidden_states: ``[B, S, D]``, that enter the layer.
        weights: of its converted attention, in the type of the hidden states.

    Returns:
        ``[B, S, D]``.
    """
    geometry, inputs = source.geometry(layer), source.attention_input(module, hidden_states)
    output = torch.stack([converted_output(geometry, weights, window) for window in inputs])
    return source.run_layer(layer, module, hidden_states, output)


class ResidualStream:
    """The hidden states of all windows; those that enter each layer lie in files.

    The first pass over the layers makes them; the last reads them again instead of running the model twice. A few
    windows at a time are in memory.

    Args:
        windows: token ids ``[N, S]``.
        kept: the files.
        processes: share the blocks of windows among them.
    """

    def __init__(self, source: SourceModel, windows: Tensor, kept: HiddenStates, processes: Processes) -> None:
        self._source, self._kept = source, kept
        self._blocks = windows.split(BLOCK)
        self._share = processes.share(len(self._blocks))
        self.windows = len(windows)

    def entering(self, layer: int, indices: Tensor) -> Tensor:
        """The hidden states ``[n, S, D]``, float32, with which the windows ``indices [n]``, ascending, enter a layer.

        An earlier call of `observe_and_advance` must have reached the layer.
        """
        of_block = indices // BLOCK
        return torch.cat(
            [
                self._entering(layer, block)[indices[of_block == block] % BLOCK].float()
                for block in of_block.unique().tolist()
            ]
        )

    def _entering(self, layer: int, block: int) -> Tensor:
        if layer == 0:
            return self._source.embed(self._blocks[block]).to(stream_dtype(self._source))
        return self._kept.read_block(layer, block)

    @property
    def own_windows(self) -> int:
        """How many windows are this process's."""
        return sum(len(self._blocks[block]) for block in self._share)

    @torch.inference_mode()
    def observe_and_advance(
        self, layer: int, observer: Observer, step: Callable[[], None], converted: MLAWeights | None = None
    ) -> None:
        """Shows this process's windows before ``layer`` to ``observer`` and moves them through it.

        After each it calls ``step``.

        Where ``converted`` is given, it takes the place of the layer's attention in moving the window on.
        """
        module = self._source.decoder_layer(layer)
        last = layer + 1 == self._source.num_layers
        for block in self._share:
            states = self._entering(layer, block)
            for index, window in enumerate(states.split(1)):
                residual = window.float()
                observer(block * BLOCK + index, self._source.attention_input(module, residual), residual)
                if not last:
                    window.copy_(
                        self._source.run_layer(layer, module, residual)
                        if converted is None
                        else run_converted(self._source, layer, module, residual, converted)
                    )
                step()
            if not last:
                self._kept.write_block(layer + 1, block, states)
