"""The last pass over the calibration text: it reaches every layer twice, in the source and in the converted model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..devices.choice import CPU
from ..devices.processes import Processes
from ..evaluation.scores import relative_error
from ..forward.attention import converted_output, source_output
from ..forward.hidden_states import BLOCK, HiddenStates
from ..forward.residual_stream import ResidualStream
from ..layers import AttentionWeights, MLAWeights, moved
from ..methods.base import LayerInputs, LayerRefit
from ..planning.text_use import refitted_windows
from ..sources import SourceModel


class Refitting:
    """Refits layer after layer, each behind the converted ones before it.

    Args:
        stream: the text in the source.
        converted: where the hidden states of the converted model are kept. A killed run goes on from those that enter
            the layer it was at.
        contexts: where what its attention gathered is kept until the layer is refitted.
        processes: share the blocks of windows among them.
    """

    def __init__(
        self,
        source: SourceModel,
        stream: ResidualStream,
        converted: HiddenStates,
        contexts: HiddenStates,
        processes: Processes,
    ) -> None:
        self.source, self.stream, self.converted, self.contexts = source, stream, converted, contexts
        self.processes = processes
        self.blocks = refitted_windows(stream.windows).split(BLOCK)
        self.share = processes.share(len(self.blocks))

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
        source, module = self.source, self.processes.together(self.source.decoder_layer, layer)
        if refit is not None:
            self.processes.together(self._gather, layer, module, refit)
            refit.sums.add_up(self.processes)
            solved = self.processes.from_first(lambda: moved(refit.weights(), CPU))
            weights = moved(solved, source.device)
            if layer + 1 < source.num_layers:
                self.processes.together(self._advance, layer, module, weights)
            self.processes.from_first(self.contexts.delete, layer)
        return weights, self.processes.from_first(self._error, layer, module, source_weights, weights)

    def _error(self, layer: int, module: nn.Module, source_weights: AttentionWeights, weights: MLAWeights) -> float:
        first = self.stream.entering(layer, self.blocks[0][:1])
        geometry, inputs = self.source.geometry(layer), self.source.attention_input(module, first)[0]
        wanted = source_output(geometry, source_weights, inputs)
        return relative_error(converted_output(geometry, weights, inputs), wanted)

    def _gather(self, layer: int, module: nn.Module, refit: LayerRefit) -> None:
        """Shows this process's windows to the refit, and keeps what the converted attention gathers."""
        for block in self.share:
            pairs = zip(self.stream.entering(layer, self.blocks[block]), self._states(layer, block), strict=True)
            gathered = [refit.update(*(self._inputs(module, window) for window in pair)) for pair in pairs]
            self.contexts.write_block(layer, block, torch.stack(gathered))

    def _states(self, layer: int, block: int) -> Tensor:
        """Hidden states ``[n, S, D]`` of the converted model before the layer."""
        return self.converted.read_block(layer, block) if layer else self.stream.entering(layer, self.blocks[block])

    def _inputs(self, module: nn.Module, window: Tensor) -> LayerInputs:
        return LayerInputs(self.source.attention_input(module, window), window)

    def _advance(self, layer: int, module: nn.Module, weights: MLAWeights) -> None:
        """Moves the converted model's hidden states through the layer, whose attention has gathered the contexts."""
        for block in self.share:
            contexts = self.contexts.read_block(layer, block)
            outputs = torch.nn.functional.linear(contexts, weights.o_proj, weights.o_proj_bias)
            moved = [
                self.source.run_layer(layer, module, window[None], output[None])
                for window, output in zip(self._states(layer, block), outputs, strict=True)
            ]
            self.converted.write_block(layer + 1, block, torch.cat(moved))
