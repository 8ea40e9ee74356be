"""Source and converted model side by side: text runs through both, one decoder layer of either in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..forward.streamed_model import StreamedModel
from .scores import ROWS, Scores, relative_error
from .source_outputs import SourceOutputs

_BLOCK_TOKENS = 8192
"""Tokens whose hidden states are in memory at a time. Every block of windows reads all weights once."""


@torch.inference_mode()
def compare_models(
    source: StreamedModel,
    converted: StreamedModel,
    layers: int,
    texts: Mapping[str, Tensor],
    step: Callable[[], None] = lambda: None,
    outputs: SourceOutputs | None = None,
) -> tuple[dict[str, Scores], tuple[float, ...]]:
    """Scores of the predictions on every text, and the errors of the converted attention.

    Args:
        source: the model that was converted.
        converted: what became of it.
        layers: how many either model has.
        texts: token ids ``[N, S]`` of the windows of each text, all of one length.
        step: called ``layers`` times for every window.
        outputs: of the source on windows that it need not read again; it is told of the others. None keeps nothing.

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
        places = block.tolist()
        # Errors of layers are of the first window.
        read = [place for place in places if place == 0 or outputs is None or outputs.leaving(windows[place]) is None]
        expected = dict(zip(read, source.enter(windows[read]), strict=True)) if read else {}
        found = dict(zip(places, converted.enter(windows[block]), strict=True))
        for layer in range(layers):
            first, wanted = expected.get(0), None
            if expected:
                with source.layer(layer) as run:
                    if first is not None:
                        wanted = _attention_output(source.attention(layer), run, first)
                    _advance(expected, run)
            with converted.layer(layer) as run:
                if first is not None and wanted is not None:
                    errors.append(relative_error(_attention_output(converted.attention(layer), run, first), wanted))
                _advance(found, run)
            for _ in block:
                step()
        if outputs is not None:
            for place, states in expected.items():
                outputs.keep_leaving(windows[place], states)
        with source.head() as predict_source, converted.head() as predict:
            for place, states in found.items():
                kept = None if outputs is None else outputs.leaving(windows[place])
                wanted_states = expected[place] if kept is None else kept.to(states.device)
                targets = windows[place, 1:].to(states.device)
                for rows in torch.arange(len(targets), device=targets.device).split(ROWS):
                    wanted_logits, logits = predict_source(wanted_states[:, rows]), predict(states[:, rows])
                    scores[names[place]].add(wanted_logits, logits, targets[rows])
    return scores, tuple(errors)


def _advance(states: dict[int, Tensor], run: Callable[[Tensor], Tensor]) -> None:
    """Moves every window through a layer."""
    for place, window in states.items():
        states[place] = run(window)


def _attention_output(attention: nn.Module, run: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """What the attention within a layer gives while ``states [1, S, D]`` run through the layer, ``[1, S, D]``."""
    outputs: list[Tensor] = []
    hook = attention.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    try:
        run(states)
    finally:
        hook.remove()
    return outputs[0]
