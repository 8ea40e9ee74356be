"""Loads a model that is MLA already, generates before and after enabling absorbed attention, prints memory and speed.

    python examples/native_mla.py deepseek-ai/DeepSeek-V2-Lite --prompt "The capital of France is"
    python examples/native_mla.py --config hub_configs/kimi-k2.6.json --prompt-tokens 2048

With --config no weights are needed: two layers with the model's attention, all else shrunk and random.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from benchmarks.shrunk import shrunk_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging

from modeling_mla import LatentCache
from modeling_mla.native_mla import enable_absorbed_attention
from modeling_mla.transformers_seams_mla import cache_of


def main() -> None:
    """Reads the command line, generates by either path, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder or a Hub id")
    parser.add_argument("--config", type=Path, help="a config.json instead of a model")
    parser.add_argument("--prompt", default="Multi-head latent attention is")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="length of the random prompt of --config")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.config is None):
        parser.error("give either a model or --config FILE")
    logging.set_verbosity_error()

    dtype = getattr(torch, arguments.dtype)
    if arguments.config is not None:
        model, tokenizer = shrunk_model(arguments.config, dtype), None
        ids = torch.randint(3, model.config.vocab_size, (1, arguments.prompt_tokens))
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, device_map="auto")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids.to(model.device)

    table = Table("", "ms a token", "cache, KiB", "same tokens", title=type(model).__name__)
    untouched, untouched_ms, cache = generate(model, ids, arguments.new_tokens)
    table.add_row("as loaded", f"{untouched_ms:.1f}", f"{stored_bytes(cache) / 1024:.0f}", "")
    enable_absorbed_attention(model)
    tokens, enabled_ms, cache = generate(model, ids, arguments.new_tokens)
    same = "yes" if torch.equal(tokens, untouched) else "no (rounding)"
    table.add_row("absorbed", f"{enabled_ms:.1f}", f"{stored_bytes(cache) / 1024:.0f}", same)
    console = Console()
    console.print(table)
    console.print(f"{untouched_ms / enabled_ms:.1f} times as fast a token, at {ids.shape[1]} tokens of prompt")
    if tokenizer is not None:
        console.print(tokenizer.decode(tokens[0], skip_special_tokens=True), highlight=False)


def generate(model: PreTrainedModel, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, float, DynamicCache]:
    """Greedy tokens, milliseconds a token without those of the prompt, and the cache."""
    times = []
    for length in (1, count):
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            return_dict_in_generate=True,
        )
        times.append(time.perf_counter() - start)
    return output.sequences, 1e3 * (times[1] - times[0]) / (count - 1), cache_of(output)


def stored_bytes(cache: DynamicCache) -> int:
    """What the cache occupies; a latent cache knows, its free capacity included."""
    if isinstance(cache, LatentCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    main()
