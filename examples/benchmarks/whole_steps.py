"""Whole decode steps of models of public shapes with random weights, by every way of keeping and reading caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from decode import step
from device_timing import median_ms
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from conversion.evaluation.decode_speed import fill
from modeling_mla import LatentCache, StaticLatentCache, disable_absorbed_attention, enable_absorbed_attention
from modeling_mla.transformers_seams_mla import cache_argument

HUB_CONFIGS = Path(__file__).resolve().parents[2] / "hub_configs"
V2_LITE = "deepseek-v2-lite"
LLAMA_8B = "llama-mla-8b"
LLAMA_LAYERS = 8
"""Of 32: a step of the whole model takes about four times as long, less the vocabulary, which is counted once."""
SPARE = 64
"""Tokens of room in a cache of fixed size behind the context."""


def random_model(config: object, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def source_config(converted: object) -> LlamaConfig:
    """Llama 3.1 8B as it was before: grouped heads, 8 for keys and values."""
    return LlamaConfig(
        hidden_size=converted.hidden_size,
        intermediate_size=converted.intermediate_size,
        num_hidden_layers=converted.num_hidden_layers,
        num_attention_heads=converted.num_attention_heads,
        num_key_value_heads=8,
        vocab_size=converted.vocab_size,
        max_position_embeddings=1 << 17,
    )


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


def touched_bytes(model: PreTrainedModel, batch: int) -> float:
    """Bytes of the weights that a step reads: of the experts as many as its tokens choose if no two choose the same."""
    total = 0.0
    chosen = getattr(model.config, "num_experts_per_tok", 0) * batch
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            continue
        routed = ".experts." in name and parameter.dim() == 3
        total += parameter.nbytes * (min(chosen / parameter.shape[0], 1.0) if routed else 1.0)
    return total


def way_row(
    model: PreTrainedModel, caches: tuple[Callable, Callable], batch: int, context: int, copy: float
) -> dict[str, float]:
    """Milliseconds of a step: called from Python, and on a GPU from a CUDA graph over a cache of fixed size.

    ``floor_ms`` is what reading weights and cache once takes at the bandwidth of a copy.
    """
    device = model.device
    cache = caches[0]()
    fill(model, cache, context, batch)
    row = {"ms": round(median_ms(step(model, cache, batch), device, least=10), 2)}
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if type(cache) is DynamicCache else 0
    nbytes = touched_bytes(model, batch) + (held or cache.nbytes)
    del cache
    if device.type == "cuda":
        static = caches[1](context + SPARE)
        replay = graphed_step(model, static, batch, context)
        row["graph_ms"] = round(median_ms(replay, device, least=10), 2)
        del static, replay
    return row | {"floor_ms": round(nbytes / copy / 1e6, 2)}


def latent_caches(model: PreTrainedModel, bits: int | None) -> tuple[Callable, Callable]:
    """Makers of a cache that grows, and of one of fixed size."""
    return (
        lambda: LatentCache(config=model.config, latent_bits=bits),
        lambda length: StaticLatentCache(model.config, max_cache_len=length, latent_bits=bits),
    )


def stock_caches(model: PreTrainedModel) -> tuple[Callable, Callable]:
    """As `latent_caches`, Transformers' own."""
    return lambda: DynamicCache(config=model.config), lambda length: StaticCache(model.config, max_cache_len=length)


def ways(device: torch.device, dtype: torch.dtype, layers: int | None) -> Iterator[tuple[str, str, object, tuple]]:
    """Model, way, the model itself, and its caches; ``layers`` instead of those that each shape has here."""
    config = AutoConfig.from_pretrained(HUB_CONFIGS / f"{V2_LITE}.json")
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = random_model(config, device, dtype)
    yield V2_LITE, "Transformers", disable_absorbed_attention(model), stock_caches(model)
    enable_absorbed_attention(model)
    for way, bits in (("absorbed", None), ("absorbed, 4 bits", 4)):
        yield V2_LITE, way, model, latent_caches(model, bits)
    del model
    converted = AutoConfig.from_pretrained(HUB_CONFIGS / f"{LLAMA_8B}.json")
    converted.num_hidden_layers = layers or LLAMA_LAYERS
    source = random_model(source_config(converted), device, dtype)
    yield LLAMA_8B, "source, grouped heads", source, stock_caches(source)
    del source
    model = random_model(converted, device, dtype)
    for way, bits in (("absorbed", None), ("absorbed, 4 bits", 4)):
        yield LLAMA_8B, way, model, latent_caches(model, bits)


def step_rows(
    device: torch.device, dtype: torch.dtype, layers: int | None, contexts: list[int], batches: list[int], copy: float
) -> list[dict]:
    """A row for every model, way, batch and context."""
    rows = []
    for name, way, model, caches in ways(device, dtype, layers):
        for batch in batches:
            for context in contexts:
                row = {"model": name, "layers": model.config.num_hidden_layers, "way": way, "batch": batch}
                rows.append(row | {"context": context} | way_row(model, caches, batch, context, copy))
    return rows
