"""What a healing trains: the attention's matrices, adapters on them, or all weights, and how fast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.reader import TensorReader
from ..errors import ConversionError
from .pair import attention_names

RATE = 4e-4
"""Step of a matrix, relative to the root mean square of its elements."""
QUERY_SHARE = 0.3
"""The part of the rate that query maps have: scores depend on them more sharply."""
LORA_RATE = 5e-4
"""Absolute, for adapters, whose matrices start from zero."""
_KL, _FASTEST = 0.15, 2.5
"""The divergence that these rates fit, nats a token, and what they are multiplied by at most."""


def pace(kl: float) -> float:
    """What the rates are multiplied by for a student that begins so far off, nats a token.

    A divergence is quadratic in the error of the weights, so what has to change goes with its root. At 0.6 nats a rate
    of 2.5 heals well and one of 6 diverges; at 0.15 one of 2.5 makes the student worse first.
    """
    # Of models that are the same, rounding may leave less than nothing.
    return min(math.sqrt(max(kl, 0.0) / _KL), _FASTEST)


def trainable_names(model: PreTrainedModel) -> list[str]:
    """The attention's projections: neither norms, nor anything outside of attention."""
    attention = tuple(f"{name}." for name in attention_names(model))
    return [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(attention) and "norm." not in name and parameter.detach().abs().max() > 0
    ]


def unfrozen(model: PreTrainedModel, names: list[str]) -> tuple[dict[str, nn.Parameter], list[dict[str, Any]]]:
    """Makes tensors themselves what is trained; one group a tensor, whose rate fits its own scale.

    Returns:
        The parameters by name, and the groups of an optimizer.
    """
    trained = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    groups = []
    for name, parameter in trained.items():
        share = QUERY_SHARE if name.split(".")[-2].startswith("q_") else 1.0
        rate = RATE * share * parameter.detach().square().mean().sqrt().item()
        groups.append({"params": [parameter], "lr": rate})
    return trained, groups


def with_adapters(
    model: PreTrainedModel, rank: int, seed: int
) -> tuple[Any, dict[str, nn.Parameter], list[dict[str, Any]]]:
    """Puts LoRA on the attention of ``model``, in place.

    Returns:
        PEFT's model around it, which merges the adapters; the adapters by name, and one group of all.

    Raises:
        ConversionError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConversionError("adapters need PEFT; install it with: pip install peft.") from error
    attention = tuple(f"{name}." for name in attention_names(model))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(attention)]
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    return adapted, adapters, [{"params": list(adapters.values()), "lr": LORA_RATE}]


@torch.no_grad()
def round_as_stored(model: PreTrainedModel, names: list[str], reader: TensorReader) -> None:
    """What is measured is what will be saved."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.to(reader.dtype(name)))
