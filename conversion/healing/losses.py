"""What a distillation minimises: how far the student is from the teacher on a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.scores import kl_divergence


def logit_loss(teacher: PreTrainedModel, student: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The mean Kullback-Leibler divergence of the student's next-token distribution, nats a token.

    Returns:
        The loss, and the student's outputs.
    """
    with torch.no_grad():
        wanted = teacher(**inputs, use_cache=False).logits
    outputs = student(**inputs, use_cache=False)
    return kl_divergence(wanted, outputs.logits), outputs
