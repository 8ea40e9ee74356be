"""One decode step of native MLA models with absorbed attention and without, side by side in one process.

The attention is that of the releases (`hub_configs`), the rest is shrunk: two layers, small dense MLPs, a small
vocabulary, random weights. Both models share their parameters.

    python examples/benchmarks/native.py
    python examples/benchmarks/native.py --models kimi-k2.6 --contexts 1024,8192,32768 --json
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from decode import step
from rows import print_rows
from shrunk import shrunk_model
from transformers import DynamicCache, PreTrainedModel

from conversion.evaluation.decode_speed import fill
from modeling_mla import LatentCache
from modeling_mla.native_mla import enable_absorbed_attention

HUB_CONFIGS = Path(__file__).resolve().parents[2] / "hub_configs"


def enabled_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model again with absorbed attention, over the same parameters."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return enable_absorbed_attention(copy.deepcopy(model, shared))


def compare(name: str, pair: tuple[PreTrainedModel, PreTrainedModel], context: int, seconds: float) -> dict:
    """One row: a step of both behind ``context`` tokens."""
    untouched, enabled = pair
    caches = DynamicCache(config=untouched.config), LatentCache(config=enabled.config)
    for model, cache in zip(pair, caches, strict=True):
        fill(model, cache, context)
    steps = step(untouched, caches[0]), step(enabled, caches[1])
    difference = (steps[0]() - steps[1]()).abs().max().item()
    times = side_by_side(steps, seconds)
    wall, cpu = ([statistics.median(step[clock] for step in own) for own in times] for clock in (0, 1))
    return {
        "model": name,
        "heads": untouched.config.num_attention_heads,
        "context": context,
        "dtype": str(untouched.dtype).removeprefix("torch."),
        "untouched_ms": round(wall[0], 2),
        "enabled_ms": round(wall[1], 2),
        "speedup": round(wall[0] / wall[1], 1),
        "untouched_cpu_ms": round(cpu[0], 2),
        "enabled_cpu_ms": round(cpu[1], 2),
        "cpu_speedup": round(cpu[0] / cpu[1], 1),
        "rounds": len(times[0]),
        "max_logit_difference": difference,
    }


def side_by_side(steps: tuple[Callable, Callable], seconds: float) -> tuple[list, list]:
    """Milliseconds of both in alternation, each time by the clock and by the processor.

    The second tells the same on a machine that others use, where the first one waits.
    """
    times: tuple[list, list] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for step_once, own in zip(steps, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            step_once()
            own.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return times


def main(
    models: Annotated[
        str, typer.Option(help="Files of hub_configs.")
    ] = "deepseek-v2-lite,kimi-k2.6,glm-4.7-flash,minicpm3-4b",
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "8192",
    dtype: Annotated[str, typer.Option(help="Precision.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Measuring time for each row.")] = 10.0,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Median time of one decode step, batch 1, two layers."""
    torch.set_num_threads(threads)
    rows = []
    for name in models.split(","):
        model = shrunk_model(HUB_CONFIGS / f"{name}.json", getattr(torch, dtype))
        pair = model, enabled_copy(model)
        rows += [compare(name, pair, int(context), seconds) for context in contexts.split(",")]
    shown = ("model", "heads", "context", "untouched_ms", "enabled_ms", "speedup", "cpu_speedup")
    print_rows(rows, as_json, shown)


if __name__ == "__main__":
    typer.run(main)
