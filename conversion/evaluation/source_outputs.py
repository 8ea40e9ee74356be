"""What a source gives on some windows, kept while several conversions of it are compared with it."""

from __future__ import annotations

from torch import Tensor

from ..devices.choice import CPU


class SourceOutputs:
    """Of one source, by the tokens that it read; all in memory, so for a few windows: a long text has too many."""

    def __init__(self) -> None:
        self._leaving: dict[bytes, Tensor] = {}
        self._continued: dict[bytes, Tensor] = {}

    def keep_leaving(self, window: Tensor, states: Tensor) -> None:
        """Keeps the hidden states ``[1, S, D]`` that leave the last layer, of a window of token ids ``[S]``."""
        self._leaving[_key(window)] = states.to(CPU)

    def leaving(self, window: Tensor) -> Tensor | None:
        """What `keep_leaving` kept, on the CPU; None where it has not been told."""
        return self._leaving.get(_key(window))

    def keep_continued(self, prompts: Tensor, tokens: Tensor) -> None:
        """Keeps the greedy continuations ``[N, count]`` of prompts ``[N, P]``, all token ids."""
        self._continued[_key(prompts)] = tokens

    def continued(self, prompts: Tensor) -> Tensor | None:
        """What `keep_continued` kept; None where it has not been told."""
        return self._continued.get(_key(prompts))


def _key(ids: Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()
