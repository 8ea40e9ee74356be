"""How far a student is from its teacher on every domain, and which states may be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..devices.processes import Processes
from ..text.mix import Domain
from .pair import Pair
from .stages import Stage
from .stages.logits import divergence

ALLOWED_RISE = 1.02
"""Of a domain's divergence over what it began with."""
ROUNDING = 1e-4
"""Nats a token, below which a divergence is that of float32 sums in another order, and no rise counts."""
DIVERGED = 3.0
"""Times the divergence that a healing began with: it does not come back from there."""

Standing = Mapping[str, float]
"""``KL(teacher || student)`` by domain, nats a token."""


def mean(standing: Standing) -> float:
    """Over all domains, each counting the same."""
    return sum(standing.values()) / len(standing)


def risen(before: Standing, after: Standing) -> list[str]:
    """The domains that are worse than they began by more than is allowed."""
    return [name for name, kl in after.items() if not kl <= max(ALLOWED_RISE * before[name], ROUNDING)]


def has_diverged(before: Standing, after: Standing) -> bool:
    """Whether the student is so far off, or so undefined, that training is over."""
    return not mean(after) <= DIVERGED * max(mean(before), ROUNDING)


class Validation:
    """The windows of every domain that are not learnt from; several processes share them.

    Args:
        domains: of the mix.
        pair: of models.
        processes: all call together.
    """

    def __init__(self, domains: Sequence[Domain], pair: Pair, processes: Processes) -> None:
        self._pair, self._processes = pair, processes
        self._windows = [(domain.name, window) for domain in domains for window in domain.validation]
        self._own = processes.share(len(self._windows))

    def standing(self) -> Standing:
        """The divergence of the student as it is now; not a number where its logits are not finite."""
        return self._by_domain(self._divergence)

    def held_out(self, stage: Stage) -> float:
        """What ``stage`` minimises, on the same windows."""

        def loss(window: Tensor) -> float:
            terms: list[float] = []
            stage.losses(self._pair, window, lambda term: terms.append(float(term)))
            return sum(terms)

        return mean(self._by_domain(loss))

    def _divergence(self, window: Tensor) -> float:
        pair = self._pair
        wanted = pair.teacher(input_ids=window, use_cache=False).logits
        return float(divergence(wanted, pair.student(**pair.student_arguments(window)).logits))

    def _by_domain(self, measure: Callable[[Tensor], float]) -> Standing:
        with self._pair.judging():
            own = {index: measure(self._windows[index][1][None].to(self._pair.device)) for index in self._own}
        values = {index: value for part in self._processes.gathered(own) for index, value in part.items()}
        by_domain: dict[str, list[float]] = {}
        for index, (name, _) in enumerate(self._windows):
            by_domain.setdefault(name, []).append(values[index])
        return {name: sum(found) / len(found) for name, found in by_domain.items()}
