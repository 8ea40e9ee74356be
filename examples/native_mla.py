"""Loads a model that is MLA already, generates before and after enabling absorbed attention, prints memory and speed.

    python examples/native_mla.py deepseek-ai/DeepSeek-V2-Lite --prompt "The capital of France is"
    python examples/native_mla.py hub_configs/kimi-k2.6.json --prompt-tokens 2048

A configuration needs no weights: two layers with the model's attention, all else shrunk and random.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks.shrunk import shrunk_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging

from modeling_mla import LatentCache
from modeling_mla.native_mla import enable_absorbed_attention
from modeling_mla.transformers_seams_mla import cache_of


def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id, or a config.json.")],
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "Multi-head latent attention is",
    prompt_tokens: Annotated[int, typer.Option(help="Of the random prompt where there is no tokenizer.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Of either answer.")] = 16,
    dtype_name: Annotated[str, typer.Option("--dtype", help="Precision.")] = "bfloat16",
) -> None:
    """Generates by either path, and prints a table."""
    logging.set_verbosity_error()
    dtype = getattr(torch, dtype_name)
    if model_name.endswith(".json"):
        model, tokenizer = shrunk_model(Path(model_name), dtype), None
        ids = torch.randint(3, model.config.vocab_size, (1, prompt_tokens))
    else:
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, device_map="auto")
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)

    table = Table("", "ms a token", "cache, KiB", "same tokens", title=type(model).__name__)
    untouched, untouched_ms, cache = generate(model, ids, new_tokens)
    table.add_row("as loaded", f"{untouched_ms:.1f}", f"{stored_bytes(cache) / 1024:.0f}", "")
    enable_absorbed_attention(model)
    tokens, enabled_ms, cache = generate(model, ids, new_tokens)
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
        wanted = {"max_new_tokens": length, "do_sample": False, "return_dict_in_generate": True}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **wanted)
        times.append(time.perf_counter() - start)
    return output.sequences, 1e3 * (times[1] - times[0]) / (count - 1), cache_of(output)


def stored_bytes(cache: DynamicCache) -> int:
    """What the cache occupies; a latent cache knows, its free capacity included."""
    if isinstance(cache, LatentCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    typer.run(main)
