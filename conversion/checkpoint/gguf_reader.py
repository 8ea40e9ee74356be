"""Tensors of a GGUF file by the names of Transformers, dequantised when asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from ..errors import SourceError, first_line
from .location import Location, split_gguf
from .reader import TensorReader


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
        parts = reader.fields.get("split.count")
        if parts is not None and parts.contents() > 1:
            raise split_gguf(location.gguf_file, parts.contents())
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

    @property
    @override
    def names(self) -> list[str]:
        return sorted(self._gguf_name)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._stored[self._gguf_name[name]].shape))

    @override
    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    @override
    def tensor(self, name: str) -> Tensor:
        stored = self._stored[self._gguf_name[name]]
        try:
            weights = self._dequantize(stored.data, stored.tensor_type)
            processed = self._processor.process(
                weights=weights, name=stored.name, tensor_key_mapping=self._mapping, parsed_parameters={}
            )
        except Exception as error:
            # Types that the library does not know, and data that is not of its type.
            raise SourceError(
                f"{stored.name} is stored as {stored.tensor_type.name}, which cannot be read ({first_line(error)}); "
                "convert the safetensors checkpoint instead."
            ) from error
        return torch.from_numpy(processed.weights.copy())
