"""Is the model that Transformers loads from a source the one whose tensors are converted?

Both look for files in a folder by rules of their own. Where they find different ones, a conversion is right in itself,
and still not of the model that its users compare it with.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import SourceError, blaming
from ..sources import SourceModel
from .loading import load_model


def check_reference(source: SourceModel) -> None:
    """Compares every tensor bit for bit, one in memory at a time.

    A GGUF is one file, whose tensors are read by Transformers' own code; Transformers loads it whole or not at all, so
    it is compared where it is loaded anyway.

    Raises:
        SourceError: Transformers cannot load the source, or loads other tensors than are converted.
    """
    # Missing and damaged files are named better by our own reader.
    source.stored_names()
    if source.location.gguf_file is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        with _quiet():
            model = load_model(source.location, "disk", offload_folder=folder)
        with blaming(SourceError, f"Transformers does not load all of {source.location.model}"):
            refuse_other_tensors(source, _tensors(model))


def refuse_other_tensors(source: SourceModel, loaded: Iterable[tuple[str, Tensor]]) -> None:
    """Raises `SourceError` where Transformers has loaded other tensors, in float32, than are converted."""
    unseen = set(source.held_names())
    for name, tensor in loaded:
        # A head that is tied to the embedding need not be stored.
        if name in unseen:
            unseen.remove(name)
            if not _are_equal(tensor.cpu(), source.held_tensors.pieces(name)):
                raise _other_model(source, name)
    if unseen:
        raise _other_model(source, min(unseen))


def _are_equal(loaded: Tensor, pieces: Iterable[Tensor]) -> bool:
    """Whether a tensor has the values of flat pieces in float32; a piece at a time, for vocabularies are large."""
    place = 0
    for piece in pieces:
        found = loaded.flatten()[place : place + piece.numel()]
        place += piece.numel()
        # What is not finite is refused where it is written.
        if not torch.equal(found.nan_to_num(), piece.float().nan_to_num()):
            return False
    return place == loaded.numel()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        with align_module_device(module):
            for own, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{own}", parameter


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Accelerate's note that parameters are on the disk: that is what was asked for."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _other_model(source: SourceModel, name: str) -> SourceError:
    return SourceError(
        f"Transformers loads another {name} from {source.location.model} than would be converted; leave one set of "
        "weights in the folder, and no adapter."
    )
