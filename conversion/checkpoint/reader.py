"""Tensors of a checkpoint by name, read only when asked for: sharded safetensors, or a GGUF."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import SourceError, first_line
from .location import Location

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorReader(ABC):
    """Lazy access to a checkpoint's tensors."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """All tensors, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU."""


class SafetensorsReader(TensorReader):
    """A folder with ``model.safetensors``, or shards and their index. Opens every shard, maps none into memory yet.

    Raises:
        SourceError: a shard is missing, truncated, or without a tensor that the index promises.
    """

    def __init__(self, folder: Path) -> None:
        self._shard_of: dict[str, str] = {}
        self._shards = {}
        expected = _read_index(folder)
        for file in sorted(set(expected.values())) if expected else [_SINGLE]:
            self._shards[file] = _open_shard(folder / file)
            self._shard_of |= dict.fromkeys(self._shards[file].keys(), file)
        for name in expected:
            if name not in self._shard_of:
                raise SourceError(f"tensor {name} is in {_INDEX} of {folder} but in no shard; fetch the model again.")

    @property
    def names(self) -> list[str]:
        return sorted(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise SourceError(f"tensor {name} is stored as {stored}, which cannot be converted; known types: {known}.")
        return _DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]].get_tensor(name)

    def _slice(self, name: str):
        return self._shards[self._shard_of[name]].get_slice(name)


class GGUFTensorReader(TensorReader):
    """A GGUF, dequantised to float32 tensor by tensor by the gguf library, renamed and reordered by Transformers.

    Args:
        model: the Transformers model of the file's configuration, on the meta device: gives names and shapes.

    Raises:
        SourceError: the file is damaged, or holds a tensor that Transformers would ignore (scaled frequencies, biases).
    """

    def __init__(self, location: Location, model: PreTrainedModel) -> None:
        import gguf
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        assert location.gguf_file is not None
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(location.folder / location.gguf_file)
            # The data of the last tensor ends the file: a truncated one fails here.
            self._stored = {tensor.name: tensor for tensor in reader.tensors}
            architecture = reader.fields["general.architecture"].contents()
        except Exception as error:
            raise SourceError(f"{location.model} is no complete GGUF file: {first_line(error)}") from error
        scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
        if scaling is not None and scaling.contents() != "none":
            raise SourceError(
                f"{location.model} scales its rotary frequencies ({scaling.contents()}), which Transformers does not "
                "read from a GGUF; convert the safetensors checkpoint instead."
            )
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        self._mapping = get_gguf_hf_weights_map(model, self._processor)
        unread = sorted(set(self._stored) - set(self._mapping))
        if unread:
            raise SourceError(
                f"{location.model} holds {unread[0]}, which Transformers does not read from a GGUF; "
                "convert the safetensors checkpoint instead."
            )
        self._gguf_name = {self._mapping[name]: name for name in self._stored}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    @property
    def names(self) -> list[str]:
        return sorted(self._gguf_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def tensor(self, name: str) -> Tensor:
        stored = self._stored[self._gguf_name[name]]
        weights = self._dequantize(stored.data, stored.tensor_type)
        processed = self._processor.process(
            weights=weights, name=stored.name, tensor_key_mapping=self._mapping, parsed_parameters={}
        )
        return torch.from_numpy(processed.weights.copy())


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file; empty where there is one unsharded file."""
    path = folder / _INDEX
    if not path.is_file():
        if not (folder / _SINGLE).is_file():
            raise SourceError(f"{folder} holds neither {_SINGLE} nor {_INDEX}; only safetensors and GGUF are read.")
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is damaged ({first_line(error)}); fetch the model again.") from error


def _open_shard(path: Path):
    if not path.is_file():
        raise SourceError(f"shard {path.name} of {path.parent} is missing; fetch the model again.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"shard {path.name} of {path.parent} is truncated or damaged ({first_line(error)}); fetch the model again."
        ) from error
