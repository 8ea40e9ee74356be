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
        """The tensor as it is exported; meta tensors give shapes.

        Args:
            name: in the checkpoint; it does not change.
            before, after: the configurations of the checkpoint and of the exported model.
        """
