"""262,144 tokens in a one-layer model of Kimi K2.6's shape: the memory of its cache, of a step, of a further prefill.

The cache is filled with random latents. Peak memory is that of the whole process, measured by a thread that samples it.

    python examples/benchmarks/long_context_memory.py --context 262144
    python examples/benchmarks/long_context_memory.py --context 262144 --cache-bits 4
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import psutil
import torch
import typer

from modeling_mla import LatentCache, LlamaMLAConfig, LlamaMLAForCausalLM
from modeling_mla.transformers_seams_mla import cache_argument

MIB = 1 << 20
_FILLED_AT_ONCE = 4096


def kimi_layer(dtype: torch.dtype) -> LlamaMLAForCausalLM:
    """One dense layer: 64 heads, rank 512, head dims 128 + 64 / 128, as in Kimi K2.6."""
    config = LlamaMLAConfig(
        vocab_size=1024,
        hidden_size=7168,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=64,
        q_lora_rank=1536,
        max_position_embeddings=1 << 19,
        rope_interleave=True,
    )
    torch.manual_seed(0)
    return LlamaMLAForCausalLM(config).to(dtype).eval()


def peak_of(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MiB that the process grew beyond its size before, at most."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        function()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return seconds, (peak - before) / MIB


def main(
    context: Annotated[int, typer.Option(help="Tokens in the cache.")] = 262144,
    prefill: Annotated[int, typer.Option(help="Tokens prefilled on top of them.")] = 512,
    dtype: Annotated[str, typer.Option(help="Precision.")] = "bfloat16",
    cache_bits: Annotated[int, typer.Option(help="Bits that are cached of a latent's channel; 16 is uncoded.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory at long context, beside what expanded keys and values would need."""
    torch.set_num_threads(threads)
    model = kimi_layer(getattr(torch, dtype))
    config = model.config
    cache = LatentCache(config=config, capacity=context + prefill, latent_bits=cache_bits)
    with torch.no_grad():
        # One token allocates the cache and the absorbed weights, so that neither counts as a step's memory.
        model(torch.zeros((1, 1), dtype=torch.long), **cache_argument(cache))
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        while cache.get_seq_length() < context - 1:
            tokens = min(_FILLED_AT_ONCE, context - 1 - cache.get_seq_length())
            cache.update(*(torch.randn(1, 1, tokens, width).to(model.dtype) for width in widths), 0)
        token = torch.ones((1, 1), dtype=torch.long)
        step_seconds, step_mib = peak_of(lambda: model(token, **cache_argument(cache)))
        tokens = torch.ones((1, prefill), dtype=torch.long)
        prefill_seconds, prefill_mib = peak_of(lambda: model(tokens, **cache_argument(cache), logits_to_keep=1))
    code = cache.layers[0].code if cache_bits < 16 else None
    per_token = config.cache_bytes_per_token(model.dtype) if code is None else code.nbytes
    expanded = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * model.dtype.itemsize
    result = {
        "context": context,
        "dtype": dtype,
        "cache_bits": cache_bits,
        "cache_mib": round(cache.nbytes / MIB, 1),
        "latent_data_mib": round(context * per_token / MIB, 1),
        "step_seconds": round(step_seconds, 3),
        "step_extra_mib": round(step_mib, 1),
        "prefill_tokens": prefill,
        "prefill_seconds": round(prefill_seconds, 2),
        "prefill_extra_mib": round(prefill_mib, 1),
        "expanded_mib": round(context * expanded / MIB, 1),
    }
    print(json.dumps(result) if as_json else "\n".join(f"{name:>18}: {value}" for name, value in result.items()))


if __name__ == "__main__":
    typer.run(main)
