"""The cache of a model at a context, printed and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..checkpoint.location import locate
from .cache_size import GROUPED_HEADS, CacheMemory, cache_memory, read_config

DEVICES = (1, 2, 4, 8, 16)
_CONTEXT = 128 * 1024


@dataclass(frozen=True)
class MemoryReport:
    """The cache of ``model``, a name to print, for a sequence of ``context`` tokens."""

    model: str
    memory: CacheMemory
    context: int

    @property
    def rows(self) -> dict[str, tuple[float, int, int]]:
        """By form of the cache: bytes a token, bytes a sequence, heads that devices can divide among them."""
        memory, context = self.memory, self.context
        grouped = min(GROUPED_HEADS, memory.heads)
        return {
            memory.attention: (memory.bytes_per_token, memory.bytes_at(context), memory.kv_heads),
            f"GQA, {grouped} key/value heads": (
                memory.grouped_bytes_per_token,
                memory.grouped_bytes_at(context),
                grouped,
            ),
            f"MHA, {memory.heads} heads": (
                memory.expanded_bytes_per_token,
                memory.expanded_bytes_at(context),
                memory.heads,
            ),
        }

    def bytes_on_device(self, form: str, devices: int) -> int:
        """Bytes of a sequence on each of ``devices`` that share attention by heads; latents are on every one."""
        _, total, heads = self.rows[form]
        return -(-total // min(devices, heads))

    def as_json(self) -> dict[str, Any]:
        """All sizes in bytes, as plain values: by what is cached, and by form of the cache and number of devices."""
        return {
            "model": self.model,
            "context": self.context,
            "dtype": str(self.memory.dtype).removeprefix("torch."),
            "layers": self.memory.layers,
            "heads": self.memory.heads,
            "parts": self._parts(),
            "cache": {
                form: {
                    "bytes_per_token": per_token,
                    "bytes_per_sequence": total,
                    "bytes_per_device": {str(count): self.bytes_on_device(form, count) for count in DEVICES},
                }
                for form, (per_token, total, _) in self.rows.items()
            },
        }

    def _parts(self) -> dict[str, int]:
        """Bytes of a sequence by what is cached."""
        parts: dict[str, int] = {}
        for part in self.memory.parts:
            size = part.entries(self.context) * part.width * (part.itemsize or self.memory.dtype.itemsize)
            parts[part.name] = parts.get(part.name, 0) + size
        return {name: size for name, size in parts.items() if size}

    def tables(self) -> list[Table]:
        """What the terminal shows: the forms of the cache, and what it consists of where that is more than one kind."""
        dtype = str(self.memory.dtype).removeprefix("torch.")
        title = (
            f"{self.model}: {self.memory.layers} layers, {self.memory.heads} heads, {self.context} tokens of {dtype}"
        )
        cache = Table("cache", title=title, title_justify="left")
        for heading in ("bytes a token", "GiB a sequence", *(f"GiB on each of {count}" for count in DEVICES[1:])):
            cache.add_column(heading, justify="right")
        for form, (per_token, total, _) in self.rows.items():
            on_devices = (gib(self.bytes_on_device(form, count)) for count in DEVICES[1:])
            cache.add_row(form, f"{per_token:.10g}", gib(total), *on_devices)
        parts = Table("of which", title_justify="left")
        parts.add_column("GiB a sequence", justify="right")
        for name, size in self._parts().items():
            parts.add_row(name, gib(size))
        return [cache, parts] if len(self._parts()) > 1 else [cache]


def report_memory(model: str | Path, context: int | None = None) -> MemoryReport:
    """The cache of a configuration file (a `Path`), or of a checkpoint (a folder or a Hub id).

    Raises:
        SourceError: it cannot be read, or its cache is not known.
    """
    config = read_config(model) if isinstance(model, Path) else locate(model, weights=False).config()
    name = model.stem if isinstance(model, Path) else model
    return MemoryReport(name, cache_memory(config), context or _CONTEXT)


def gib(size: int) -> str:
    """``size`` bytes in GiB."""
    return f"{size / 2**30:.2f}"
