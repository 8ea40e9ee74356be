"""Times of calls on a device by its own clock, and how fast it multiplies matrices."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

SECONDS = 0.15
"""Measuring time for each figure, at least."""
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


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of matrices."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: left @ right, device) / 1e9


def card(device: torch.device) -> str:
    """The name of what is measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'CPU'}, {torch.get_num_threads()} threads"
