"""What a model is, what can be done with it, and what its cache costs, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedConfig

from ..checkpoint.location import locate
from ..errors import SourceError
from ..sources import source_of
from .abilities import abilities_of, without_conversion
from .cache_size import cache_memory
from .quirks import quirks_of

_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "num_key_value_heads")
CONTEXTS = (4 * 1024, 32 * 1024, 128 * 1024, 256 * 1024)


@dataclass(frozen=True)
class Inspection:
    """What a model is, what can be done with it, and what its cache costs.

    ``attention`` names what it caches, ``"MLA"`` or other; ``sizes`` are the fields that the cache depends on.
    ``quirks`` are what its attention has beside the plain kind, ``abilities`` what is possible, or why it is not, by
    what one might want.
    """

    model: str
    family: str
    attention: str
    layers: int
    hidden_size: int
    heads: int
    sizes: dict[str, Any]
    dtype: str
    cache_bytes_per_token: int
    quirks: list[str]
    abilities: dict[str, str]

    @property
    def cache_bytes(self) -> dict[str, int]:
        """The bytes of a sequence, by its length."""
        return {f"{context // 1024}K": context * self.cache_bytes_per_token for context in CONTEXTS}

    def as_json(self) -> dict[str, Any]:
        """All fields and `cache_bytes`, as plain values."""
        return dict(vars(self)) | {"cache_bytes": self.cache_bytes}

    def table(self) -> Table:
        """What the terminal shows."""
        table = Table(title=self.model, show_header=False, title_justify="left")
        table.add_row("family", f"{self.family}, {self.layers} layers, hidden size {self.hidden_size}")
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        table.add_row("attention", f"{self.attention}, {self.heads} heads, {sizes}")
        if self.quirks:
            table.add_row("quirks", "; ".join(self.quirks))
        table.add_row("cache, bytes a token", f"{self.cache_bytes_per_token} ({self.dtype})")
        for context, size in self.cache_bytes.items():
            table.add_row(f"cache at {context}", f"{size / 2**30:.2f} GiB")
        for what, answer in self.abilities.items():
            table.add_row(what, answer)
        return table


def inspect_model(model: str) -> Inspection:
    """Reads the configuration of a model, convertible or not; why it is not is among its abilities.

    Raises:
        SourceError: it cannot be found or read, or its cache is not known.
    """
    location = locate(model, weights=False)
    config = location.config()
    try:
        source = source_of(location, config)
    except SourceError as error:
        return _by_fields(model, config, without_conversion(config, str(error)))
    geometry, dtype = source.geometry(0), source.dtype
    kind = {1: "multi-query", geometry.num_heads: "multi-head"}.get(geometry.num_kv_heads, "grouped-query")
    return Inspection(
        model=model,
        family=config.model_type,
        attention=kind,
        layers=source.num_layers,
        hidden_size=geometry.hidden_size,
        heads=geometry.num_heads,
        sizes={"num_key_value_heads": geometry.num_kv_heads, "head_dim": geometry.head_dim},
        dtype=str(dtype).removeprefix("torch."),
        cache_bytes_per_token=source.cache_bytes_per_token(dtype),
        quirks=quirks_of(source),
        abilities=abilities_of(source),
    )


def _by_fields(model: str, whole: PreTrainedConfig, abilities: dict[str, str]) -> Inspection:
    config = whole.get_text_config(decoder=True)
    memory = cache_memory(config)
    layer = config.per_layer_config[0]
    sizes = {name: getattr(layer, name) for name in _SIZES if getattr(layer, name, None) is not None}
    ranks = getattr(config, "kv_lora_ranks", None)
    if ranks is not None:
        sizes["kv_lora_rank"] = f"{min(ranks)} to {max(ranks)}"
    return Inspection(
        model=model,
        family=config.model_type,
        attention=memory.attention,
        layers=memory.layers,
        hidden_size=config.hidden_size,
        heads=memory.heads,
        sizes=sizes,
        dtype=str(memory.dtype).removeprefix("torch."),
        cache_bytes_per_token=int(memory.bytes_per_token),
        quirks=[],
        abilities=abilities,
    )
