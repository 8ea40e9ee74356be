"""A converted model and the one that it was made from, in one process, with one copy of what they have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_mla.configuration_mla import is_coded
from modeling_mla.latent_attention_mla import LatentAttention

from ..checkpoint.location import Location
from ..checkpoint.reader import TensorReader
from ..devices.choice import CPU
from ..errors import SourceError, first_line
from ..evaluation.accounting import kept, passed_through
from ..evaluation.loading import load_model
from ..evaluation.reference import check_reference
from ..forward.products import fast_float32
from ..sources import SourceModel, open_source

_PLAIN_WINDOW = 1024
"""Tokens up to which attention weights are formed and kept for the gradient."""


@dataclass(frozen=True)
class Pair:
    """``student`` learns to do what ``teacher`` does; both on ``device``, in float32, without dropout."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    device: torch.device

    def student_arguments(self, ids: Tensor) -> dict[str, Any]:
        """What the student is called with: a coded cache is read from, so that what codes lose is learnt too.

        The gradient passes the code as if it were none (see `modeling_mla.cache_coded_mla`).
        """
        return {"input_ids": ids, "use_cache": is_coded(self.student.config)}

    @contextmanager
    def learning(self, window: int) -> Iterator[None]:
        """Within it products are in bfloat16 where the device has instructions for it, and else in float32.

        On a CPU, PyTorch has no fused attention for keys and values of two widths: what it does instead takes 2.5 times
        as long as plain attention, whose weights fit into memory for a ``window`` of so many tokens.
        """
        half, config = _multiplies_bfloat16(self.device), self.student.config
        own = config._attn_implementation
        if half and self.device.type == "cpu" and window <= _PLAIN_WINDOW:
            config._attn_implementation = "eager"
        try:
            with fast_float32(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                yield
        finally:
            config._attn_implementation = own

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Within it all is in float32, and nothing is learnt."""
        with fast_float32(), torch.no_grad():
            yield


def attention_names(model: PreTrainedModel) -> list[str]:
    """The attention of every layer, by its name in the model."""
    return [name for name, module in model.named_modules() if isinstance(module, LatentAttention)]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def open_teacher(model: str, teacher: str, config: PreTrainedConfig, reader: TensorReader) -> SourceModel:
    """The model that a converted one was made from.

    Args:
        model: what the user calls the converted one.
        teacher: what the user calls the other.
        config: of the converted one.
        reader: of its tensors.

    Raises:
        SourceError: the model is not converted, or the teacher another one than it was made from: of the tensors that
            no conversion touches one differs.
    """
    if not hasattr(config, "kv_lora_ranks"):
        raise SourceError(f"{model} is a {config.model_type} model; give a converted one.")
    source = open_source(teacher)
    if config.vocab_size != source.config.vocab_size:
        raise SourceError(
            f"{teacher} has a vocabulary of {source.config.vocab_size}, {model} one of {config.vocab_size}; the "
            "teacher must be the model that it was made from."
        )
    for name in passed_through(source):
        if not kept(name, reader, source):
            raise SourceError(
                f"{name} of {teacher} is not that of {model}; the teacher must be the model that it was made from."
            )
    check_reference(source)
    return source


def load_pair(location: Location, source: SourceModel, changing: Collection[str] | None) -> Pair:
    """Loads the converted model, and beside it what its source has of its own.

    Args:
        location: of the converted model.
        source: of the other, on the device.
        changing: names of tensors beside the attention's that healing changes, so that each needs its own; None for
            all.

    Raises:
        SourceError: one cannot be loaded.
    """
    student = load_model(location, source.device)
    try:
        with CPU, init_empty_weights(include_buffers=False):
            teacher = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
        _fill(teacher, student, source, changing)
    except Exception as error:
        # Transformers' own classes, on whatever the configuration has.
        raise SourceError(f"{source.location.model} cannot be loaded by Transformers: {first_line(error)}") from error
    student.requires_grad_(False)
    return Pair(teacher.eval(), student, source.device)


def _fill(
    teacher: PreTrainedModel, student: PreTrainedModel, source: SourceModel, changing: Collection[str] | None
) -> None:
    common = {}
    if changing is not None:
        # A conversion may leave a tensor of the attention as it was, and healing not.
        own = (*changing, *(f"{name}." for name in attention_names(student)))
        common = {name: weight for name, weight in student.named_parameters() if not name.startswith(own)}
    stored = set(source.held_names())
    for name, _ in list(teacher.named_parameters()):
        if name not in stored:
            continue
        tensor = source.placed(name)
        shared = common.get(name)
        if shared is not None and torch.equal(shared, tensor):
            _set(teacher, name, shared)
        else:
            _set(teacher, name, nn.Parameter(tensor, requires_grad=False))
    for name, buffer in list(teacher.named_buffers()):
        owner, _, own = name.rpartition(".")
        value = source.placed(name) if name in stored else buffer.to(source.device)
        teacher.get_submodule(owner)._buffers[own] = value
    teacher.tie_weights()


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    model.get_submodule(owner)._parameters[own] = parameter
