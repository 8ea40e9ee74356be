"""``logits``: the student's next-token distribution becomes the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from ...evaluation.scores import ROWS
from ..pair import Pair
from .base import Stage


class Logits(Stage):
    """Minimises ``KL(teacher || student)``, nats a token.

    Args:
        temperature: by which the logits of both are divided; the divergence is multiplied by its square, as Hinton et
            al. have it (arXiv 1503.02531, section 2).
        cross_entropy: weight of the student's loss on the text itself, beside 1 for the divergence.
    """

    stage: Literal["logits"] = "logits"
    share: float = Field(default=0.7, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    cross_entropy: float = Field(default=0.0, ge=0)

    @override
    def losses(self, pair: Pair, ids: Tensor, each: Callable[[Tensor], None]) -> None:
        with torch.no_grad():
            wanted = pair.teacher(input_ids=ids, use_cache=False).logits
        found = pair.student(**pair.student_arguments(ids)).logits
        loss = divergence(wanted, found, self.temperature)
        if self.cross_entropy:
            predicted = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss = loss + self.cross_entropy * predicted
        each(loss)


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean ``KL(teacher || student)`` at a temperature, times its square, nats a token.

    Args:
        teacher: logits ``[B, S, vocabulary]``.
        student: the same, with a gradient.
        temperature: divides both.
    """
    return _Divergence.apply(teacher, student, temperature)


class _Divergence(torch.autograd.Function):
    """The gradient is made with the value, a few rows at a time: of a large vocabulary both take long to read."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        rows = student.shape[:-1].numel()
        parts = (logits.flatten(0, -2).split(ROWS) for logits in (teacher, student, gradient))
        for wanted, found, slope in zip(*parts, strict=True):
            log_p = torch.log_softmax(wanted / temperature, -1, dtype=torch.float32)
            log_q = torch.log_softmax(found / temperature, -1, dtype=torch.float32)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            slope.copy_(log_q.exp_().sub_(p).mul_(temperature / rows))
        ctx.save_for_backward(gradient)
        return total * (temperature**2 / rows)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * above[0], None
