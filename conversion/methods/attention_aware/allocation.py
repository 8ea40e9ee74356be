"""Ranks by layer: every unit of rank goes where it removes most error (water-filling)."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence

from torch import Tensor


def allocate_ranks(gains: list[Tensor], total: int, smallest: int, largest: int, step: int = 1) -> list[int]:
    """Hands out ``total`` ranks over layers, always to the layer whose next directions gain most.

    Args:
        gains: for each layer the error that each further rank removes, descending, in units that compare over layers.
        total: sum of all ranks, at least ``smallest`` a layer.
        smallest: rank that every layer gets.
        largest: rank that no layer exceeds.
        step: ranks that are handed out together; all are multiples of it.

    Returns:
        One rank a layer, adding up to ``total`` (less only where every layer is at its largest).
    """
    if step > 1:
        blocks = [gain[: len(gain) // step * step].unflatten(0, (-1, step)).sum(1) for gain in gains]
        return [step * rank for rank in allocate_ranks(blocks, total // step, smallest // step, largest // step)]
    ranks = [smallest] * len(gains)
    limits = [min(largest, len(gain)) for gain in gains]
    queue = [(-float(gain[smallest]), layer) for layer, gain in enumerate(gains) if smallest < limits[layer]]
    heapq.heapify(queue)
    for _ in range(total - sum(ranks)):
        if not queue:
            break
        _, layer = heapq.heappop(queue)
        ranks[layer] += 1
        if ranks[layer] < limits[layer]:
            heapq.heappush(queue, (-float(gains[layer][ranks[layer]]), layer))
    return ranks


def near_median(rates: Sequence[float], spread: tuple[float, float]) -> list[float]:
    """``rates`` held between ``spread[0]`` and ``spread[1]`` times their median; all 1 where that is 0."""
    median = statistics.median(rates)
    if median <= 0:
        return [1.0] * len(rates)
    return [min(max(rate, spread[0] * median), spread[1] * median) for rate in rates]
