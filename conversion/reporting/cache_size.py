"""How much a model caches, from the fields of its configuration alone, whosever the model is.

What is counted is what Transformers stores for one sequence: latents and rotary keys, keys and values, keys of sparse
indexers, compressed entries, recurrent states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from modeling_mla.configuration_mla import is_coded, latent_widths

from ..checkpoint.paths import did_you_mean
from ..errors import SourceError, first_line

GROUPED_HEADS = 8
"""Key/value heads of the grouped-query cache that others are compared with, as in Llama 3 and Qwen 2.5."""
_FAR = 2**20
"""Tokens after which every window is full; a multiple of every compression rate."""


@dataclass(frozen=True)
class CachePart:
    """One kind of entry that a layer keeps.

    Args:
        name: what the entries are.
        width: values in an entry.
        entries: how many there are after so many tokens.
        grouped: values that an entry would have as keys and values of `GROUPED_HEADS` heads.
        expanded: the same of all heads.
        itemsize: bytes of a value where it is not the model's type.
    """

    name: str
    width: int
    entries: Callable[[int], int]
    grouped: int
    expanded: int
    itemsize: int | None = None


@dataclass(frozen=True)
class CacheMemory:
    """The cache of a model for one sequence.

    ``attention`` names what is cached; ``heads`` are query heads, ``kv_heads`` those among which a device may split the
    cache (1 for latents: every device needs them all); ``parts`` are those of all layers.
    """

    attention: str
    layers: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    parts: tuple[CachePart, ...]

    def bytes_at(self, tokens: int) -> int:
        """Bytes that one sequence of ``tokens`` tokens holds."""
        return self._total(tokens, lambda part: part.width)

    def grouped_bytes_at(self, tokens: int) -> int:
        """The same with keys and values of `GROUPED_HEADS` heads."""
        return self._total(tokens, lambda part: part.grouped)

    def expanded_bytes_at(self, tokens: int) -> int:
        """The same with keys and values of every head."""
        return self._total(tokens, lambda part: part.expanded)

    def _total(self, tokens: int, width: Callable[[CachePart], int]) -> int:
        return sum(part.entries(tokens) * width(part) * (part.itemsize or self.dtype.itemsize) for part in self.parts)

    @property
    def bytes_per_token(self) -> float:
        """Bytes by which a token lengthens the cache; windows and states count nothing."""
        return (self.bytes_at(2 * _FAR) - self.bytes_at(_FAR)) / _FAR

    @property
    def expanded_bytes_per_token(self) -> float:
        """The same with keys and values of every head."""
        return (self.expanded_bytes_at(2 * _FAR) - self.expanded_bytes_at(_FAR)) / _FAR

    @property
    def grouped_bytes_per_token(self) -> float:
        """The same with keys and values of `GROUPED_HEADS` heads."""
        return (self.grouped_bytes_at(2 * _FAR) - self.grouped_bytes_at(_FAR)) / _FAR


def read_config(file: Path) -> PreTrainedConfig:
    """A configuration file of any model; of a type that Transformers does not know, the plain fields.

    Raises:
        SourceError: it cannot be read, or leaves open what the cache depends on.
    """
    if not file.is_file():
        raise SourceError(f"{file} is no file{did_you_mean(file)}; give the config.json of a model.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as a JSON configuration: {first_line(error)}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise SourceError(f"{file} has no model_type; give the config.json of a model.")
    if fields["model_type"] == "deepseek_v4" and not fields.keys() & {"compress_ratios", "layer_types"}:
        raise SourceError(
            f"{file} names no compress_ratios: which of its layers compress differs by release; add them."
        )
    known = fields["model_type"] in CONFIG_MAPPING
    try:
        if known:
            return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        # Rotary fields do not touch the cache, and the base class expects more of a model that has them.
        return PreTrainedConfig.from_dict({name: fields[name] for name in fields if not name.startswith("rope_")})
    except Exception as error:
        # Transformers' validation raises many kinds.
        raise SourceError(f"{file} is no valid configuration: {first_line(error)}") from error


def cache_memory(config: PreTrainedConfig) -> CacheMemory:
    """The cache of the model that ``config`` describes.

    Raises:
        SourceError: it has a field missing or a kind of layer whose cache is not known.
    """
    text = config.get_text_config(decoder=True)
    dtype = _dtype(text)
    layers = [text.per_layer_config[index] for index in range(text.num_hidden_layers)]
    kv_heads = 1
    try:
        parts = tuple(_compressed(text) if hasattr(text, "compress_rates") else _layers(text))
        heads = max(layer.num_attention_heads for layer in layers)
    except AttributeError as error:
        raise SourceError(f"the configuration of type {config.model_type!r} lacks a field: {error}.") from error
    if hasattr(text, "compress_rates"):
        attention = "compressed shared head"
    elif all(map(_has_latents, layers)):
        attention = "MLA"
    else:
        attention, kv_heads = "keys and values", max(map(_kv_heads, layers))
    return CacheMemory(attention, len(layers), heads, kv_heads, dtype, parts)


def _has_latents(layer: Any) -> bool:
    # A file may hold a field that its model does not know; of a model that Transformers does not know, all count.
    known = type(layer) is PreTrainedConfig or hasattr(type(layer), "kv_lora_rank")
    return known and getattr(layer, "kv_lora_rank", None) is not None


def _dtype(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def _growing(tokens: int) -> int:
    return tokens


def _once(tokens: int) -> int:
    return int(tokens > 0)


def _last(window: int) -> Callable[[int], int]:
    """The sliding window without the token being processed."""
    return lambda tokens: min(tokens, window - 1)


def _kv_heads(layer: Any) -> int:
    return getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads


def _unlike_attention(name: str, width: int, entries: Callable[[int], int], itemsize: int | None = None) -> CachePart:
    """What stays as it is, however many heads share keys and values."""
    return CachePart(name, width, entries, grouped=width, expanded=width, itemsize=itemsize)


def _layers(config: Any) -> Iterator[CachePart]:
    layer_types, layer_kwargs = get_layer_types_and_kwargs(config)
    sharing = getattr(config, "kv_sharing_modes", None) or [None] * len(layer_types)
    for index, (kind, kwargs) in enumerate(zip(layer_types, layer_kwargs, strict=True)):
        if kind == "dummy":
            continue
        if kind == "linear_attention":
            yield from _linear(config)
            continue
        if kind not in ("full_attention", "indexed_attention", "sliding_attention", "chunked_attention"):
            raise SourceError(f"layer {index} is of type {kind!r}, whose cache is not known.")
        window = kwargs.get("sliding_window")
        if sharing[index] != "reuse_but_indexer":
            yield _attention(config, index, _growing if window is None else _last(window))
        if kind == "indexed_attention" and _has_indexer(config, index):
            yield _unlike_attention("indexer keys", _indexer_width(config), _growing)


def _attention(config: Any, index: int, entries: Callable[[int], int]) -> CachePart:
    layer = config.per_layer_config[index]
    heads = layer.num_attention_heads
    if not _has_latents(layer):
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        kv_heads = _kv_heads(layer)
        per_head = 2 * head_dim
        grouped, expanded = min(GROUPED_HEADS, heads) * per_head, heads * per_head
        return CachePart("keys and values", kv_heads * per_head, entries, grouped, expanded)
    code = config.layer_latent_code(index) if is_coded(config) else None
    rank, rotary = latent_widths(config, index)
    if not (getattr(config, "no_rope_layers", None) or [1] * (index + 1))[index]:
        rotary = 0
    # The value is as wide as the un-rotated key where the configuration names no width (MiniCPM3).
    value = layer.v_head_dim or layer.hidden_size // heads
    per_head = layer.qk_nope_head_dim + layer.qk_rope_head_dim + value
    grouped, expanded = min(GROUPED_HEADS, heads) * per_head, heads * per_head
    if code is None:
        return CachePart("latents", rank + rotary, entries, grouped, expanded)
    itemsize = _dtype(config).itemsize
    return CachePart("coded latents", code.nbytes, entries, grouped * itemsize, expanded * itemsize, itemsize=1)


def _has_indexer(config: Any, index: int) -> bool:
    kinds = getattr(config, "indexer_types", None)
    return kinds is None or kinds[index] == "full"


def _indexer_width(config: Any) -> int:
    # A pooling indexer (GLM 5.3) caches keys, gates and a flag.
    return 2 * config.index_head_dim + 1 if hasattr(config, "index_kpool") else config.index_head_dim


def _linear(config: Any) -> Iterator[CachePart]:
    """Kimi Delta Attention: the inputs of three short convolutions, and one float32 matrix a head."""
    heads = getattr(config, "linear_num_heads", config.num_attention_heads)
    head_dim = getattr(config, "linear_head_dim", None) or config.head_dim
    kernel = getattr(config, "linear_conv_kernel_dim", None) or config.short_conv_kernel_size
    yield _unlike_attention("convolution state", 3 * heads * head_dim * kernel, _once)
    yield _unlike_attention("recurrent state", heads * head_dim**2, _once, itemsize=torch.float32.itemsize)


def _compressed(config: Any) -> Iterator[CachePart]:
    """DeepSeek V4: one shared key/value head, in a window and in entries that stand for 4 or 128 tokens each."""
    width, window = config.head_dim, config.sliding_window
    grouped, expanded = (2 * count * width for count in (GROUPED_HEADS, config.num_attention_heads))
    for kind in config.layer_types:
        # Sliding layers store the head as key and as value, compressing ones once.
        copies = 2 if kind == "sliding_attention" else 1
        if kind == "sliding_attention":
            yield CachePart("window", copies * width, _last(window), grouped, expanded)
            continue
        yield CachePart("window", width, _last(window), 0, 0)
        yield CachePart("keys and values of all tokens", 0, _growing, grouped, expanded)
        rate = config.compress_rates[kind]
        if kind == "heavily_compressed_attention":
            yield from _compressor(width, rate, series=1)
        else:
            yield from _compressor(width, rate, series=2)
            yield from _compressor(config.index_head_dim, rate, series=2)


def _compressor(width: int, rate: int, series: int) -> Iterator[CachePart]:
    """Entries of ``rate`` tokens, the tokens that wait for the next one, and what overlaps into it."""
    parts = {"compressed entries": (width, lambda tokens: tokens // rate)}
    parts["waiting tokens"] = (2 * series * width, lambda tokens: tokens % rate)
    if series == 2:
        parts["overlap"] = (2 * rate * width, lambda tokens: int(tokens >= rate))
    for name, (values, entries) in parts.items():
        yield CachePart(name, values, entries, grouped=0, expanded=0)
