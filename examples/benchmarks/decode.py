"""One decode step of this library beside what Transformers does with the same weights, in one process.

Three comparisons: Transformers' DeepSeek-V3 attention against ours over the same parameters (both cache latents; theirs
expands the whole cache at every step), a standard checkpoint against its conversion, and our caches of fewer bits
against the uncoded one. Beside each, what no step can be faster than: reading the weights and the cache once, at the
speed of a copy that is measured in the same process.

    python examples/benchmarks/decode.py
    python examples/benchmarks/decode.py --source MODEL --converted OUT --contexts 1024,4096,8192
    python examples/benchmarks/decode.py --source MODEL --converted OUT --cache-bits 16,4 --contexts 64,1024,4096
    python examples/benchmarks/decode.py --cache-bits 16,8,4 --contexts 1024,4096,16384,65536
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from roof import copy_bandwidth, step_bytes
from rows import print_rows
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, PreTrainedModel

from conversion.evaluation.decode_speed import fill
from modeling_mla import LatentCache, LlamaMLAConfig, LlamaMLAForCausalLM
from modeling_mla.transformers_seams_mla import cache_argument

HEADS, RANK, ROPE, HEAD = 16, 512, 64, 128
STEPS_IN_A_ROW = 4
GROWN = 32
"""Tokens by which a cache grows before it is cut back: libraries may compile for every length."""
BODY = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "kv_lora_rank": RANK,
    "q_lora_rank": None,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": HEAD,
    "max_position_embeddings": 1 << 18,
}


def deepseek_pair(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Transformers' dense DeepSeek-V3 and our model with its very weights."""
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**BODY, first_k_dense_replace=4, num_key_value_heads=HEADS))
    ours = LlamaMLAForCausalLM(LlamaMLAConfig(**BODY, rope_interleave=True, rms_norm_eps=1e-6))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def step(model: PreTrainedModel, cache: DynamicCache, batch: int = 1) -> Callable[[], torch.Tensor]:
    """A function that decodes one token more each time, and now and then takes them back."""
    token = torch.ones((batch, 1), dtype=torch.long, device=model.device)
    context = cache.get_seq_length()

    @torch.no_grad()
    def run() -> torch.Tensor:
        grown = cache.get_seq_length() - context
        if grown == GROWN:
            cache.crop(-grown)
        return model(token, **cache_argument(cache)).logits

    return run


def side_by_side(baseline: Callable, ours: Callable, seconds: float) -> tuple[float, float, int]:
    """Median milliseconds of both, in alternation, so that whatever slows the machine slows both.

    Each runs a few steps in a row, as decoding does: after the other's step its weights are in no cache.
    """
    times: tuple[list[float], list[float]] = ([], [])
    baseline(), ours()
    end = time.perf_counter() + seconds
    while len(times[0]) < 2 * STEPS_IN_A_ROW or time.perf_counter() < end:
        for function, bucket in zip((baseline, ours), times, strict=True):
            for _ in range(STEPS_IN_A_ROW):
                start = time.perf_counter()
                function()
                bucket.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1]), len(times[0])


def floor(model: PreTrainedModel, cache: DynamicCache, milliseconds: float) -> dict:
    """A copy's GB/s, what reading all that a step reads takes at it, and how near to that the step comes."""
    bandwidth = copy_bandwidth(model.device)
    least = step_bytes(model, cache) / bandwidth / 1e6
    return {
        "copy_gb_s": round(bandwidth, 1),
        "floor_ms": round(least, 3),
        "to_floor": round(milliseconds / least, 2),
        "share_of_copy": round(least / milliseconds, 3),
    }


def compare(
    theirs: PreTrainedModel, ours: PreTrainedModel, context: int, seconds: float, same: bool, bits: int | None = None
) -> dict:
    """One row: a step of either model behind ``context`` tokens; the floor is that of ours.

    ``bits`` are those of our cache, None for what the model's configuration says.
    """
    caches = DynamicCache(config=theirs.config), LatentCache(config=ours.config, latent_bits=bits)
    for model, cache in zip((theirs, ours), caches, strict=True):
        fill(model, cache, context)
    baseline, own = step(theirs, caches[0]), step(ours, caches[1])
    row = {"context": context, "dtype": str(ours.dtype).removeprefix("torch.")}
    if bits is not None:
        row["cache_bits"] = bits
    if same:
        row["max_logit_difference"] = (baseline() - own()).abs().max().item()
    baseline_ms, ours_ms, rounds = side_by_side(baseline, own, seconds)
    return row | {
        "baseline_ms": round(baseline_ms, 3),
        "ours_ms": round(ours_ms, 3),
        "speedup": round(baseline_ms / ours_ms, 2),
        **floor(ours, caches[1], ours_ms),
        "rounds": rounds,
    }


def step_of_bits(model: PreTrainedModel, bits: int, context: int, seconds: float) -> dict:
    """One row: a step over a cache of so many bits a channel (16: uncoded), and how fast it reads the cache."""
    cache = LatentCache(config=model.config, capacity=context + GROWN, latent_bits=bits)
    fill(model, cache, context)
    run, times = step(model, cache), []
    run()
    end = time.perf_counter() + seconds
    while len(times) < 2 * STEPS_IN_A_ROW or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "context": context,
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache_bits": bits,
        "cache_mib": round(cache.nbytes / (1 << 20), 2),
        "ms": round(1e3 * median, 3),
        "gib_per_second": round(cache.nbytes / (1 << 30) / median, 2),
        **floor(model, cache, 1e3 * median),
        "rounds": len(times),
    }


def load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model from a folder, a Hub id, or a folder with one GGUF file."""
    files = list(Path(name).glob("*.gguf"))
    extra = {"gguf_file": files[0].name} if len(files) == 1 else {}
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=not extra, **extra).eval()


def main(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "64,1024,4096,16384",
    dtypes: Annotated[str, typer.Option(help="Precisions, separated by commas.")] = "float32,bfloat16",
    source: Annotated[str | None, typer.Option(help="Compare this checkpoint ...")] = None,
    converted: Annotated[str | None, typer.Option(help="... with its conversion.")] = None,
    cache_bits: Annotated[str | None, typer.Option(help="Compare caches of these bits, separated by commas.")] = None,
    seconds: Annotated[float, typer.Option(help="Measuring time for each row.")] = 6.0,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Median time of one decode step, batch 1."""
    torch.set_num_threads(threads)
    rows = []
    for name in dtypes.split(","):
        dtype = getattr(torch, name)
        if cache_bits and not (source and converted):
            model = load(converted, dtype) if converted else deepseek_pair(dtype)[1]
            rows += [
                step_of_bits(model, int(bits), int(context), seconds)
                for context in contexts.split(",")
                for bits in cache_bits.split(",")
            ]
            continue
        if source and converted:
            pair, same = (load(source, dtype), load(converted, dtype)), False
        else:
            pair, same = deepseek_pair(dtype), True
        rows += [
            compare(*pair, int(context), seconds, same, bits)
            for context in contexts.split(",")
            for bits in ([int(bits) for bits in cache_bits.split(",")] if cache_bits else [None])
        ]
    print_rows(rows, as_json)


if __name__ == "__main__":
    typer.run(main)
