"""A form in which a converted checkpoint is handed to something else than Transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import override

from ..checkpoint.location import Location
from ..checkpoint.reader import SafetensorsReader, TensorReader
from ..checkpoint.writer import ShardWriter
from ..progress import counting
from .whole_queries import WholeQueries, without_head_maps


class Exporter(ABC):
    """One target of `mla export`."""

    name: ClassVar[str]
    runs: ClassVar[tuple[str, ...]]
    """Commands that run what was written to ``{folder}``."""

    @abstractmethod
    def write(self, location: Location, config: PreTrainedConfig, folder: Path, progress: Progress) -> int:
        """Writes the model's new form.

        Args:
            location: of the converted checkpoint.
            config: its configuration.
            folder: an empty one, which gets its name when it is complete.
            progress: counts what is written.

        Returns:
            Bytes that the new form caches for one token.

        Raises:
            ConversionError: the target cannot express the model; nothing is written then.
        """


class CheckpointExporter(Exporter):
    """A target that is a checkpoint too: shards of safetensors, configuration, tokenizer."""

    reads_head_maps: ClassVar[bool] = False
    """Whether it knows ``q_head_proj`` behind a plain ``q_proj``."""

    @abstractmethod
    def config(self, config: PreTrainedConfig) -> Any:
        """The exported model's configuration. Raises `ConversionError` for what the target cannot express."""

    @abstractmethod
    def tensors(self, name: str, tensor: Tensor, before: PreTrainedConfig, after: Any) -> dict[str, Tensor]:
        """What becomes of one tensor, by its new names: one, several or none.

        Args:
            name: in the checkpoint.
            tensor: of any shape, as the checkpoint stores it; on the meta device where only shape and type are wanted.
            before: the configuration of the checkpoint.
            after: that of the exported model, made by `config`.
        """

    def save_config(self, after: Any, folder: Path) -> None:
        """Writes the configuration, and whatever else the target wants beside the weights."""
        after.save_pretrained(folder)

    def cache_bytes_per_token(self, after: Any, dtype: torch.dtype) -> int:
        """Bytes that the exported model caches for one token in ``dtype``."""
        return after.cache_bytes_per_token(dtype)

    @override
    def write(self, location: Location, config: PreTrainedConfig, folder: Path, progress: Progress) -> int:
        reader: TensorReader = SafetensorsReader(location.folder)
        if not self.reads_head_maps:
            reader, config = WholeQueries(reader, config), without_head_maps(config)
        after = self.config(config)
        layout: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for name in reader.names:
            stored = torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta")
            made = self.tensors(name, stored, config, after)
            layout |= made
            origin |= dict.fromkeys(made, name)

        def fetch(name: str) -> list[Tensor]:
            source = origin[name]
            return [self.tensors(source, reader.tensor(source), config, after)[name].flatten()]

        writer = ShardWriter(folder, layout)
        with counting(progress, "writing", len(writer.files)) as step:
            for file in writer.files:
                writer.write(file, fetch)
                step()
        writer.write_index()
        self.save_config(after, folder)
        location.generation_config(config).save_pretrained(folder)
        location.tokenizer().save_pretrained(folder)
        return self.cache_bytes_per_token(after, config.dtype or torch.bfloat16)
