"""One decode step of DeepSeek V4's attention with the shared head uncopied and as Transformers does it, side by side.

The attention is that of the Flash release (`hub_configs`), one layer of each compressing kind; the rest is shrunk and
random. Caches are filled with random entries, for a prompt of this length would take too long.

    python examples/benchmarks/deepseek_v4.py
    python examples/benchmarks/deepseek_v4.py --contexts 8192,131072 --json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from native import HUB_CONFIGS, side_by_side
from rows import print_rows
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from conversion.reporting.cache_size import cache_memory, read_config
from modeling_mla.native_shared_head_mla import disable_shared_head_attention, enable_shared_head_attention
from modeling_mla.transformers_seams_mla import cache_argument


def shrunk_model(dtype: torch.dtype) -> PreTrainedModel:
    """One layer that compresses by 4 and one by 128, with four small experts."""
    config = read_config(HUB_CONFIGS / "deepseek-v4-flash.json")
    config.num_hidden_layers = 2
    config.layer_types = ["compressed_sparse_attention", "heavily_compressed_attention"]
    config.mlp_layer_types = ["moe", "moe"]
    config.vocab_size, config.n_routed_experts, config.num_experts_per_tok = 1024, 4, 2
    config.moe_intermediate_size = 256
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def filled_cache(model: PreTrainedModel, context: int) -> DynamicCache:
    """As if ``context`` tokens had passed, a multiple of 128."""
    config = model.config
    cache = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(1)

    def entries(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(model.dtype)

    for layer in cache.layers:
        layer.update(window := entries(1, config.sliding_window, config.head_dim), window)
        layer.cumulative_length = context
        for name in layer.compressed_kv:
            width = config.index_head_dim if name == "indexer" else config.head_dim
            count = context // layer.compress_rate
            layer.compressed_kv[name], layer.entry_count[name] = entries(count, width), count
            if layer.compress_rate == 4:
                layer.overlap_kv[name], layer.overlap_gate[name] = entries(4, width), entries(4, width)
    return cache


def step(model: PreTrainedModel, cache: DynamicCache, switch: Callable) -> Callable[[], torch.Tensor]:
    """A function that decodes one more token."""

    @torch.no_grad()
    def run() -> torch.Tensor:
        return switch(model)(torch.ones((1, 1), dtype=torch.long), **cache_argument(cache)).logits

    return run


def compare(model: PreTrainedModel, context: int, seconds: float) -> dict:
    """One row: both ways behind ``context`` tokens."""
    ways = disable_shared_head_attention, enable_shared_head_attention
    steps = tuple(step(model, filled_cache(model, context), way) for way in ways)
    difference = (steps[0]() - steps[1]()).abs().max().item()
    times = side_by_side(steps, seconds)
    untouched, enabled = (statistics.median(wall for wall, _ in own) for own in times)
    cpu = [statistics.median(cpu for _, cpu in own) for own in times]
    return {
        "context": context,
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache_bytes_per_token": cache_memory(model.config).bytes_per_token,
        "untouched_ms": round(untouched, 2),
        "enabled_ms": round(enabled, 2),
        "speedup": round(untouched / enabled, 1),
        "cpu_speedup": round(cpu[0] / cpu[1], 1),
        "max_logit_difference": difference,
    }


def main(
    contexts: Annotated[str, typer.Option(help="Tokens, multiples of 128, separated by commas.")] = "8192,65536",
    dtype: Annotated[str, typer.Option(help="Precision.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Measuring time for each row.")] = 5.0,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Median time of one decode step, batch 1, two layers."""
    torch.set_num_threads(threads)
    model = shrunk_model(getattr(torch, dtype))
    rows = [compare(model, int(context), seconds) for context in contexts.split(",")]
    print_rows(rows, as_json)


if __name__ == "__main__":
    typer.run(main)
