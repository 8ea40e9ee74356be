"""A form in which a converted checkpoint is handed to something else than Transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig


class Exporter(ABC):
    """One target of `mla export`: a configuration, and every tensor by itself."""

    name: ClassVar[str]

    @abstractmethod
    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The exported model's configuration. Raises `ConversionError` for what the target cannot express."""

    @abstractmethod
    def tensor(self, name: str, tensor: Tensor, before: PreTrainedConfig, after: PreTrainedConfig) -> Tensor:
        """The tensor as it is exported, under the same name.

        Args:
            name: in the checkpoint.
            tensor: as the checkpoint stores it, or on the meta device where only shape and type are wanted.
            before: the configuration of the checkpoint.
            after: the configuration of the exported model, made by `config`.
        """
