"""What it costs to append one token to a cache, and what memory the cache takes: ours beside `DynamicCache`.

python examples/benchmarks/cache_growth.py --contexts 4096,65536
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer
from rows import print_rows
from transformers import Cache, DynamicCache

from modeling_mla import LatentCache, LlamaMLAConfig

CONFIG = LlamaMLAConfig(num_hidden_layers=1)  # rank 512 beside 64 rotary channels, DeepSeek's cache


def states(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents ``[1, 1, tokens, r]`` and rotary keys ``[1, 1, tokens, d_r]``."""
    return tuple(torch.randn(1, 1, tokens, width).to(dtype) for width in (CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim))


def append_times(caches: tuple[Cache, Cache], context: int, steps: int, dtype: torch.dtype) -> list[float]:
    """Mean milliseconds an append, growth included, of each cache behind ``context`` tokens, in alternation."""
    prompt, token = states(context, dtype), states(1, dtype)
    for cache in caches:
        cache.update(*prompt, 0)
    totals: list[list[float]] = [[], []]
    for _ in range(steps):
        for cache, total in zip(caches, totals, strict=True):
            start = time.perf_counter()
            cache.update(*token, 0)
            total.append(1e3 * (time.perf_counter() - start))
    # The mean would show one hiccup of the machine, the median would hide the rare growth: trim the slowest percent.
    return [statistics.mean(sorted(total)[: -max(steps // 100, 1)]) for total in totals]


def measure(context: int, steps: int, dtype: torch.dtype) -> dict:
    """One row: times, and memory against the data that is stored."""
    ours = LatentCache(config=CONFIG)
    baseline_ms, ours_ms = append_times((DynamicCache(config=CONFIG), ours), context, steps, dtype)
    data = ours.get_seq_length() * CONFIG.cache_bytes_per_token(dtype)
    exact = LatentCache(config=CONFIG, capacity=context)
    exact.update(*states(context, dtype), 0)
    return {
        "context": context,
        "dtype": str(dtype).removeprefix("torch."),
        "baseline_ms": round(baseline_ms, 4),
        "ours_ms": round(ours_ms, 4),
        "speedup": round(baseline_ms / ours_ms, 1),
        "memory_over_data": round(ours.nbytes / data, 3),
        "known_length_over_data": round(exact.nbytes / (context * CONFIG.cache_bytes_per_token(dtype)), 3),
    }


def main(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "1024,16384,65536",
    dtypes: Annotated[str, typer.Option(help="Precisions, separated by commas.")] = "float32,bfloat16",
    steps: Annotated[int, typer.Option(help="Tokens appended.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Appending one token, batch 1, one layer of rank 512 with 64 rotary channels."""
    rows = [
        measure(int(context), steps, getattr(torch, dtype))
        for dtype in dtypes.split(",")
        for context in contexts.split(",")
    ]
    print_rows(rows, as_json)


if __name__ == "__main__":
    typer.run(main)
