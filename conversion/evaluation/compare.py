"""Source and converted model side by side: text runs through both, one decoder layer of either in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..forward.streamed_model import StreamedModel
from .scores import ROWS, Scores, relative_error

_BLOCK_TOKENS = 8192
"""Tokens whose hidden states are in memory at a time. Every block of windows reads all weights once."""


@torch.inference_mode()
def compare_models(
    source: StreamedModel,
    converted: StreamedModel,
    layers: int,
    texts: Mapping[str, Tensor],
    step: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Scores], tuple[float, ...]]:
    """Scores of the predictions on every text, and the errors of the converted attention.

    Args:
        source: the model that was converted.
        converted: what became of it.
        layers: how many either model has.
        texts: token ids ``[N, S]`` of the windows of each text, all of one length.
        step: called ``layers`` times for every window.

    Returns:
        The scores by text; and by layer the relative squared error of the attention output where both models read the
        source's hidden states, on the first window. Without any window there are none.
    """
    windows = torch.cat(tuple(texts.values()))
    names = [name for name, of_text in texts.items() for _ in of_text]
    scores = {name: Scores() for name in texts}
    errors: list[float] = []
    size = max(1, _BLOCK_TOKENS // windows.shape[1])
    for block in torch.arange(len(windows), device="cpu").split(size) if len(windows) else ():
        expected, found = source.enter(windows[block]), converted.enter(windows[block])
        for layer in range(layers):
            first, wanted = expected[0], None
            with source.layer(layer) as run:
                if len(errors) == layer:
                    wanted = _attention_output(source.attention(layer), run, first)
                _advance(expected, run)
            with converted.layer(layer) as run:
                if wanted is not None:
                    errors.append(relative_error(_attention_output(converted.attention(layer), run, first), wanted))
                _advance(found, run)
            for _ in block:
                step()
        with source.head() as predict_source, converted.head() as predict:
            for window, wanted_states, found_states in zip(block.tolist(), expected, found, strict=True):
                targets = windows[window, 1:].to(found_states.device)
                for rows in torch.arange(len(targets), device=targets.device).split(ROWS):
                    wanted_logits, logits = predict_source(wanted_states[:, rows]), predict(found_states[:, rows])
                    scores[names[window]].add(wanted_logits, logits, targets[rows])
    return scores, tuple(errors)


def _advance(states: list[Tensor], run: Callable[[Tensor], Tensor]) -> None:
    """Moves every window through a layer."""
    for index, window in enumerate(states):
        states[index] = run(window)


def _attention_output(attention: nn.Module, run: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """What the attention within a layer gives while ``states [1, S, D]`` run through the layer, ``[1, S, D]``."""
    outputs: list[Tensor] = []
    hook = attention.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    try:
        run(states)
    finally:
        hook.remove()
    return outputs[0]
