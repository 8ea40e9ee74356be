"""How long a decode step takes behind a context that is not read first: the cache is filled with random states."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from modeling_mla.cache_mla import LatentCache
from modeling_mla.transformers_seams_mla import cache_argument

from ..devices.choice import free_bytes
from ..sources import is_mla

FILLED_AT_ONCE = 4096
"""Tokens that are written into a cache at a time."""
_LEAST_STEPS, _MOST_STEPS = 3, 10
_SECONDS = 0.5
"""For the steps at one context, once the least are done."""
_PATIENCE = 20.0
"""Seconds that the least steps, or filling the cache, may take at one context."""
_BESIDE = 1.5
"""Memory for a cache, in units of it: what a layer needs while it appends, and attends, comes on top."""


def fill(model: PreTrainedModel, cache: Cache, context: int, batch: int = 1, deadline: float = math.inf) -> bool:
    """Writes ``context`` random tokens into every layer, in the shapes that the model's own forward wrote one token.

    Args:
        model: whose cache it is.
        cache: empty.
        context: tokens.
        batch: sequences.
        deadline: of `time.monotonic`, at which it gives up.

    Returns:
        Whether the cache is full.
    """
    token = torch.zeros((batch, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(token, **cache_argument(cache))
    generator = torch.Generator(model.device).manual_seed(1)
    for index, layer in enumerate(cache.layers):
        drawn = [
            torch.randn(
                (*states.shape[:2], min(FILLED_AT_ONCE, context), states.shape[-1]),
                generator=generator,
                device=model.device,
            ).to(model.dtype)
            for states in (layer.keys, layer.values)
        ]
        for start in range(1, context, FILLED_AT_ONCE):
            if time.monotonic() > deadline:
                return False
            keys, values = (states[:, :, : context - start] for states in drawn)
            cache.update(keys, values, index)
    return True


@torch.no_grad()
def decode_milliseconds(
    model: PreTrainedModel, contexts: Sequence[int], cache_bytes: Callable[[int], int]
) -> dict[str, float | None]:
    """Median milliseconds of a step of one sequence, by the tokens that are cached.

    A context may be longer than the model was trained for: a step costs the same. Contexts whose cache does not fit
    into memory, or that would take longer than anybody waits, are None, and so are all beyond them.

    Args:
        model: with the cache that ``generate`` would make: of latents, or Transformers' own.
        contexts: ascending.
        cache_bytes: what so many tokens take.
    """
    found: dict[str, float | None] = dict.fromkeys(map(str, contexts))
    least_known, before = 0.0, 1
    for context in contexts:
        expected = least_known * context / before
        fits = _BESIDE * cache_bytes(context) < free_bytes(model.device)
        if not fits or _LEAST_STEPS * expected > _PATIENCE:
            break
        cache = LatentCache(config=model.config) if is_mla(model.config) else DynamicCache(config=model.config)
        if not fill(model, cache, context, deadline=time.monotonic() + _PATIENCE):
            break
        seconds = _step_seconds(model, cache)
        found[str(context)] = 1000 * seconds
        least_known, before = seconds, context
    return found


def _step_seconds(model: PreTrainedModel, cache: Cache) -> float:
    """The median; the steps lengthen the cache by as many tokens."""
    token = torch.ones((1, 1), dtype=torch.long, device=model.device)

    def step() -> float:
        started = time.perf_counter()
        # Fetching a value waits for the device.
        float(model(token, **cache_argument(cache)).logits[0, -1, 0])
        return time.perf_counter() - started

    step()
    ends = time.monotonic() + _SECONDS
    taken: list[float] = []
    while len(taken) < _LEAST_STEPS or (time.monotonic() < ends and len(taken) < _MOST_STEPS):
        taken.append(step())
    return statistics.median(taken)
