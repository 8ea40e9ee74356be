"""How long a decode step takes behind a context that is not read first: the cache is filled with random states."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from modeling_mla.cache_coded_mla import CodedLatentLayer
from modeling_mla.cache_layers_mla import LatentLayer
from modeling_mla.cache_mla import LatentCache
from modeling_mla.transformers_seams_mla import CacheLayerMixin, DynamicLayer, cache_argument

from ..devices.choice import free_bytes
from ..sources import is_mla

FILLED_AT_ONCE = 4096
"""Tokens that are written into a cache at a time."""
_LEAST_STEPS, _MOST_STEPS = 3, 10
_SECONDS = 1.0
"""For the steps at one context, once the least are done."""
_PATIENCE = 40.0
"""Seconds that the least steps, or filling the caches, may take at one context."""
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


def fill_by_repeating(model: PreTrainedModel, cache: Cache, context: int, deadline: float = math.inf) -> bool:
    """As `fill`, of a cache that grows: layers that hold every token get a few, and then those again and again.

    Coding every token of a long context, or moving all that is held at every piece, would take longer than its steps.
    """
    if not fill(model, cache, min(context, FILLED_AT_ONCE), deadline=deadline):
        return False
    for layer in cache.layers:
        if time.monotonic() > deadline:
            return False
        _lengthen(layer, context)
    return True


def _lengthen(layer: CacheLayerMixin, context: int) -> None:
    if type(layer) in (LatentLayer, CodedLatentLayer):
        saved = layer.saved()
        layer.restore(replace(saved, rows=_repeated(saved.rows, 1, context)), layer.dtype)
        return
    missing = context - layer.get_seq_length()
    # Others forget tokens: more at a time than they keep would only be moved.
    piece = min(missing, missing if type(layer) is DynamicLayer else FILLED_AT_ONCE)
    keys, values = (_repeated(states, 2, piece) for states in (layer.keys, layer.values))
    for start in range(0, missing, piece or 1):
        layer.update(keys[:, :, : missing - start], values[:, :, : missing - start])


def _repeated(states: Tensor, dim: int, length: int) -> Tensor:
    """The first ``length`` along ``dim`` of ``states`` one after the other."""
    times = [1] * states.dim()
    times[dim] = -(-length // states.shape[dim])
    return states.repeat(times).narrow(dim, 0, length)


@torch.no_grad()
def decode_milliseconds(
    models: Sequence[PreTrainedModel], contexts: Sequence[int], cache_bytes: Callable[[int], int]
) -> list[dict[str, float | None]]:
    """Median milliseconds of a step of one sequence, of each model by the tokens that are cached.

    The models' steps alternate, so that whatever slows the machine slows all. A context may be longer than a model was
    trained for: a step costs the same. Contexts whose caches do not fit into memory, or that would take longer than
    anybody waits, are None, and so are all beyond them.

    Args:
        models: with the caches that ``generate`` would make: of latents, or Transformers' own.
        contexts: ascending.
        cache_bytes: what so many tokens take in all caches together.
    """
    found: list[dict[str, float | None]] = [dict.fromkeys(map(str, contexts)) for _ in models]
    known, before = 0.0, 1
    for context in contexts:
        fits = _BESIDE * cache_bytes(context) < free_bytes(models[0].device)
        if not fits or _LEAST_STEPS * known * context / before > _PATIENCE:
            break
        caches = [_cache(model) for model in models]
        deadline = time.monotonic() + _PATIENCE
        if not all(fill_by_repeating(*pair, context, deadline=deadline) for pair in zip(models, caches, strict=True)):
            break
        seconds = _step_seconds(models, caches)
        for of_model, taken in zip(found, seconds, strict=True):
            of_model[str(context)] = 1000 * taken
        known, before = sum(seconds), context
    return found


def _cache(model: PreTrainedModel) -> Cache:
    return LatentCache(config=model.config) if is_mla(model.config) else DynamicCache(config=model.config)


def _step_seconds(models: Sequence[PreTrainedModel], caches: Sequence[Cache]) -> list[float]:
    """The median of each model; the steps lengthen its cache by as many tokens."""

    def step(model: PreTrainedModel, cache: Cache) -> float:
        token = torch.ones((1, 1), dtype=torch.long, device=model.device)
        started = time.perf_counter()
        # Fetching a value waits for the device.
        float(model(token, **cache_argument(cache)).logits[0, -1, 0])
        return time.perf_counter() - started

    rounds: list[list[float]] = []
    ends = math.inf
    while len(rounds) <= _LEAST_STEPS or (time.monotonic() < ends and len(rounds) < _MOST_STEPS):
        rounds.append([step(*pair) for pair in zip(models, caches, strict=True)])
        # The first one warms up.
        ends = time.monotonic() + _SECONDS if len(rounds) == 1 else ends
    return [statistics.median(taken) for taken in zip(*rounds[1:], strict=True)]
