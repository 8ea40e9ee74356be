"""What a healing trains: the attention's matrices, or adapters on them, and how fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_mla.latent_attention_mla import LatentAttention

from ..checkpoint.reader import TensorReader
from ..errors import ConversionError

RATE = 4e-4
"""Step of a matrix, relative to the root mean square of its elements."""
QUERY_SHARE = 0.3
"""The part of the rate that query maps have: scores depend on them more sharply."""
LORA_RATE = 5e-4
"""Absolute, for adapters, whose matrices start from zero."""


def trainable_names(model: PreTrainedModel) -> list[str]:
    """The attention's projections: neither norms, nor anything outside of attention."""
    attention = _attention(model)
    return [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(attention) and "norm." not in name and parameter.detach().abs().max() > 0
    ]


def _attention(model: PreTrainedModel) -> tuple[str, ...]:
    """How the names of its parameters begin, in every layer."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LatentAttention))


def unfrozen(model: PreTrainedModel, names: list[str]) -> list[dict[str, Any]]:
    """Makes the matrices themselves what is trained; one group a tensor, whose rate fits its own scale."""
    model.requires_grad_(False)
    groups = []
    for name in names:
        parameter = model.get_parameter(name).requires_grad_(True)
        share = QUERY_SHARE if name.split(".")[-2].startswith("q_") else 1.0
        rate = RATE * share * parameter.detach().square().mean().sqrt().item()
        groups.append({"params": [parameter], "lr": rate})
    return groups


def with_adapters(model: PreTrainedModel, rank: int, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """The model with LoRA on its attention, and one group of all adapters.

    Raises:
        ConversionError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConversionError("adapters need PEFT; install it with: pip install peft.") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(_attention(model))]
    torch.manual_seed(seed)
    student = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    adapters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return student, [{"params": adapters, "lr": LORA_RATE}]


@torch.no_grad()
def round_as_stored(model: PreTrainedModel, names: list[str], reader: TensorReader) -> None:
    """What is measured is what will be saved."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.to(reader.dtype(name)))
