"""In what order the windows of a mix are learnt from: fixed by a seed, and known for any step without those before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .mix import Domain

_PERIOD = 128
"""Windows among which every domain has its share, to one window."""
_SEEDS = 1_000_003
"""How far apart the seeds of two domains or periods are."""


class Schedule:
    """The windows of the domains that have a weight and any windows of this length.

    Args:
        domains: of a mix.
        window: tokens in a window.
        seed: of the order, another one in every epoch of a domain.
    """

    def __init__(self, domains: Sequence[Domain], window: int, seed: int) -> None:
        found = [(domain, domain.windows(window)) for domain in domains if domain.weight > 0]
        self._windows = [windows for _, windows in found if len(windows)]
        weights = [domain.weight for domain, windows in found if len(windows)]
        self._turns, self._seed = _shares(weights), seed
        self._shuffled = lru_cache(maxsize=4 * len(weights) + 4)(self._drawn)

    @property
    def is_empty(self) -> bool:
        """Whether no domain has a window so long."""
        return not self._windows

    def __getitem__(self, place: int) -> Tensor:
        """Token ids ``[S]`` of the window that comes at this place, from 0."""
        period, within = divmod(place, _PERIOD)
        order = self._shuffled(0, period, _PERIOD)
        chosen = [index for index, turns in enumerate(self._turns) for _ in range(turns)]
        domain = chosen[order[within]]
        earlier = sum(chosen[turn] == domain for turn in order[:within])
        epoch, number = divmod(period * self._turns[domain] + earlier, len(self._windows[domain]))
        return self._windows[domain][self._shuffled(domain + 1, epoch, len(self._windows[domain]))[number]]

    def _drawn(self, kind: int, epoch: int, length: int) -> list[int]:
        generator = torch.Generator("cpu").manual_seed((self._seed * _SEEDS + kind) * _SEEDS + epoch)
        return torch.randperm(length, generator=generator, device="cpu").tolist()


def _shares(weights: list[float]) -> list[int]:
    """Whole numbers that add up to the period, in proportion to the weights (largest remainders)."""
    total = sum(weights)
    exact = [_PERIOD * weight / total for weight in weights]
    whole = [int(share) for share in exact]
    rest = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in rest[: _PERIOD - sum(whole)]:
        whole[index] += 1
    return whole
