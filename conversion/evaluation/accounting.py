"""Every tensor of a converted checkpoint is there, is finite, and is the source's where no conversion touches it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.model_reader import as_held
from ..checkpoint.reader import SafetensorsReader, TensorReader
from ..errors import VerificationError
from ..sources import SourceModel


def check_tensors(folder: Path, model: PreTrainedModel, source: SourceModel) -> tuple[int, int]:
    """Accounts for every tensor of a converted checkpoint.

    Args:
        folder: of the checkpoint.
        model: of its configuration, on the meta device; it has the tensors that there must be.
        source: what the checkpoint was made from.

    Returns:
        How many there are, and how many are the source's bit for bit.

    Raises:
        VerificationError: one is missing, unknown, misshapen, not finite, or not the source's though no conversion
            touches it.
        SourceError: one cannot be read, or is of a type that holds no weights.
    """
    reader, expected = SafetensorsReader(folder), model.state_dict()
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    held = as_held(reader, model)
    unknown = sorted(set(held.names) - set(expected))
    missing = sorted(set(expected) - set(held.names) - tied)
    if unknown or missing:
        found = f"lacks {missing[0]}" if missing else f"holds unknown {unknown[0]}"
        raise VerificationError(f"{folder} {found}; convert the model again.")
    for name in held.names:
        wanted = tuple(expected[name].shape)
        if held.shape(name) != wanted:
            raise VerificationError(
                f"{name} of {folder} is {held.shape(name)}, but its configuration means {wanted}; "
                "convert the model again."
            )
    unconverted = passed_through(source)
    for name in set(reader.names).difference(unconverted):
        reader.require_weights(name)
    for name in reader.names:
        if not all(torch.isfinite(piece.float()).all() for piece in reader.pieces(name)):
            raise VerificationError(f"{name} of {folder} is not finite; convert the model again.")
    unchanged = 0
    for name in unconverted:
        if not kept(name, reader, source):
            raise VerificationError(
                f"{name} of {folder} is not the source's, though only attention is converted; give the model that it "
                "was made from, or convert it again."
            )
        unchanged += reader.dtype(name) == source.tensors.dtype(name)
    return len(reader.names), unchanged


def passed_through(source: SourceModel) -> list[str]:
    """The tensors of a source that every conversion keeps under their names."""
    return [name for name in source.stored_names() if source.replaced(name) is None]


def kept(name: str, reader: TensorReader, source: SourceModel) -> bool:
    """Whether a converted checkpoint has a tensor of the source, rounded to the type that it is stored in."""
    if name not in reader.names or reader.shape(name) != source.tensors.shape(name):
        return False
    both = zip(reader.pieces(name), source.tensors.pieces(name), strict=True)
    return all(torch.equal(_bytes(stored), _bytes(original.to(stored.dtype))) for stored, original in both)


def _bytes(piece: Tensor) -> Tensor:
    return piece.contiguous().view(torch.uint8)
