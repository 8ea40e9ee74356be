"""The roof for the speed of what reads much and computes little: a copy, and what a decode step has to read."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Cache, PreTrainedModel


def copy_bandwidth(device: torch.device, copies: int = 9) -> float:
    """GB/s of the fastest of some large copies, bytes read and written: no processor's cache holds them."""
    source = torch.empty(1 << (31 if device.type == "cuda" else 28), dtype=torch.uint8, device=device).random_(0, 255)
    target, times = torch.empty_like(source), []
    for _ in range(copies):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times) / 1e9


def step_bytes(model: PreTrainedModel, cache: Cache) -> int:
    """Bytes that a step reads: every weight once, of an embedding that is no head one row, and what is cached."""
    weights = {id(parameter): parameter.nbytes for parameter in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedding:
        weights[id(embedding)] = embedding[0].nbytes
    return sum(weights.values()) + sum(_cached_bytes(layer) for layer in cache.layers)


def _cached_bytes(layer: Any) -> int:
    # A code is read as it is, and says itself what it takes; of a plain buffer the free rows are not read.
    if getattr(layer, "code", None) is not None:
        return layer.nbytes
    return layer.keys.nbytes + layer.values.nbytes
