"""Absorbed attention by every backend that runs here, against the bandwidth that a copy reaches in the same process.

A step has to read the cache once; GB/s count these bytes alone, and the share is that of a copy's, bytes read and
written together. On a GPU, calls are replayed from a CUDA graph over so many caches that none stays in the second-level
cache, so that neither launches nor repetition flatter or hide anything.

    python examples/benchmarks/kernel_bandwidth.py                       # kernels
    python examples/benchmarks/kernel_bandwidth.py --steps               # and whole steps of DeepSeek-V2-Lite's shape
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from decode import fill, step
from roof import copy_bandwidth
from rows import print_rows
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from modeling_mla import LatentCache, StaticLatentCache, disable_absorbed_attention, enable_absorbed_attention
from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backends_mla import BACKENDS, why_not
from modeling_mla.masks_mla import VisibleKeys
from modeling_mla.transformers_seams_mla import cache_argument

HERE = Path(__file__).parent
SHAPES = ((512, 64, 16), (512, 64, 32), (512, 64, 64), (512, 64, 128), (256, 64, 32), (128, 32, 16))
"""Rank, rotary width, heads."""
V2_LITE = HERE.parents[1] / "hub_configs" / "deepseek-v2-lite.json"
LARGEST_CACHE, ROTATED, MOST_CACHES = 1 << 34, 1 << 28, 64
"""Bytes of one cache at most; bytes over which calls rotate where one is smaller, and how many caches at most."""
SECONDS = 0.15
STEP_COLUMNS = ("batch", "context", "native_ms", "enabled_ms", "native_graph_ms", "enabled_graph_ms")
GRAPHED_MS = 20.0
"""Calls that take longer are not captured: launches no longer matter."""


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done its work; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(function: Callable[[], object], device: torch.device, least: int = 3) -> float:
    """Median milliseconds of calls one after another, by the device's own clock where it has one."""
    function()
    synchronize(device)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < least or time.perf_counter() < end:
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            function()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def replayed(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU the function as a CUDA graph, so that launches do not count; otherwise the function."""
    if device.type != "cuda" or median_ms(function, device, least=1) > GRAPHED_MS:
        return function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@torch.no_grad()
def kernel_rows(
    shape: tuple[int, int, int], batch: int, context: int, dtype: torch.dtype, device: torch.device, copy: float
) -> list[dict]:
    """A row for every backend that serves the shape."""
    rank, rope, heads = shape
    nbytes = batch * context * (rank + rope) * dtype.itemsize
    count = 1 if device.type == "cpu" else max(min(ROTATED // nbytes, MOST_CACHES), 1)
    caches = [torch.randn(batch, context, rank + rope, device=device, dtype=dtype) for _ in range(count)]
    query = torch.randn(batch, heads, 1, rank + rope, device=device, dtype=dtype)
    visible = VisibleKeys(None, 1, context, device)
    wanted = AbsorbedShape(batch, heads, 1, context, rank, rope, dtype, device, has_mask=False)
    rows = []
    for name, backend in BACKENDS.items():
        if why_not(name, wanted) is not None:
            continue

        def attend(backend=backend) -> None:
            for latents in caches:
                backend.attend(query, latents, rank, (rank + rope) ** -0.5, visible, None)

        ms = median_ms(replayed(attend, device), device) / count
        rate = nbytes / ms / 1e6
        rows.append(
            {
                "backend": name,
                "rank": rank,
                "rope": rope,
                "heads": heads,
                "batch": batch,
                "context": context,
                "dtype": str(dtype).removeprefix("torch."),
                "microseconds": round(1e3 * ms, 1),
                "gb_s": round(rate, 1),
                "share_of_copy": round(rate / copy, 3),
            }
        )
    return rows


def v2_lite(device: torch.device, dtype: torch.dtype, layers: int | None) -> PreTrainedModel:
    """A model of DeepSeek-V2-Lite's shape with random weights."""
    config = AutoConfig.from_pretrained(V2_LITE)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def graphed_step(model: PreTrainedModel, cache: StaticCache, batch: int, context: int) -> Callable[[], object]:
    """A CUDA graph that decodes one token behind a filled static cache and takes it back."""
    device = model.device
    fill(model, cache, context, batch)
    token = torch.ones((batch, 1), dtype=torch.long, device=device)
    position = torch.full((batch, 1), context, device=device)

    def run() -> None:
        model(token, **cache_argument(cache), position_ids=position)
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)

    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> tuple[torch.Tensor, torch.Tensor]:
        graph.replay()
        return token, position  # the graph reads where they lie, so they must live as long

    return replay


def step_row(model: PreTrainedModel, batch: int, context: int, device: torch.device) -> dict:
    """One decode step by Transformers' own path, and with absorbed attention: by wall clock, launches included.

    On a GPU also from a CUDA graph over a static cache, which leaves launches out.
    """
    row = {
        "model": "DeepSeek-V2-Lite's shape",
        "layers": model.config.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": batch,
        "context": context,
    }
    for name, change, kind, static_kind in (
        ("native", disable_absorbed_attention, DynamicCache, StaticCache),
        ("enabled", enable_absorbed_attention, LatentCache, StaticLatentCache),
    ):
        change(model)
        cache = kind(config=model.config)
        fill(model, cache, context, batch)
        row[f"{name}_ms"] = round(median_ms(step(model, cache, batch), device, least=10), 2)
        del cache
        if device.type == "cuda":
            static = static_kind(model.config, max_cache_len=context + 64)
            replay = graphed_step(model, static, batch, context)
            row[f"{name}_graph_ms"] = round(median_ms(replay, device, least=10), 2)
            del static, replay
    row["speedup"] = round(row["native_ms"] / row["enabled_ms"], 2)
    if device.type == "cuda":
        row["graph_speedup"] = round(row["native_graph_ms"] / row["enabled_graph_ms"], 2)
    return row


def numbers(text: str) -> list[int]:
    """The integers in a list separated by commas."""
    return [int(part) for part in text.split(",")]


def card(device: torch.device) -> str:
    """The name of what is measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'CPU'}, {torch.get_num_threads()} threads"


def main(
    batches: Annotated[str, typer.Option(help="Sequences, separated by commas.")] = "1,32,128",
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "4096,32768,262144",
    dtype: Annotated[str, typer.Option(help="Precision.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to measure; by default a GPU if there is one.")] = "",
    steps: Annotated[bool, typer.Option("--steps", help="Also whole steps of DeepSeek-V2-Lite's shape.")] = False,
    layers: Annotated[int | None, typer.Option(help="Layers of that model; by default all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON file, which is named by the card.")] = HERE / "results",
) -> None:
    """Microseconds, GB/s and share of a copy, for shapes of public models."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    place = torch.device("cuda", place.index or 0) if place.type == "cuda" else place
    precision, copy = getattr(torch, dtype), copy_bandwidth(place)
    torch.manual_seed(0)
    kernels: list[dict] = []
    for shape in SHAPES:
        for batch in numbers(batches):
            for context in numbers(contexts):
                if batch * context * (shape[0] + shape[1]) * precision.itemsize <= LARGEST_CACHE:
                    kernels += kernel_rows(shape, batch, context, precision, place, copy)
    print(f"{card(place)}: a copy moves {copy:.0f} GB/s")
    print_rows(kernels, as_json=False)
    result = {
        "card": card(place),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_gb_s": round(copy, 1),
        "kernels": kernels,
    }
    if steps:
        model = v2_lite(place, precision, layers)
        result["steps"] = [step_row(model, batch, context, place) for batch in (1, 8) for context in (8192, 32768)]
        shown = [name for name in STEP_COLUMNS if name in result["steps"][0]]
        print_rows(result["steps"], as_json=False, shown=shown)
    name = re.sub(r"[^a-z0-9]+", "-", card(place).lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"kernels-{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
