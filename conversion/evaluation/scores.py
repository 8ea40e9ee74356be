"""How close one model's predictions are to another's, summed over text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_mla.configuration_mla import is_coded

from ..forward.products import fast_float32

ROWS = 128
"""Positions whose distributions over the vocabulary are formed at a time."""


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean ``KL(teacher || student)`` in nats a token (Hinton et al., arXiv 1503.02531, at temperature 1).

    Args:
        teacher: logits ``[B, S, vocabulary]``.
        student: the same.
    """
    total = student.new_zeros(())
    for wanted, found in zip(teacher.flatten(0, 1).split(ROWS), student.flatten(0, 1).split(ROWS), strict=True):
        log_wanted, log_found = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
        total = total + (log_wanted.exp() * (log_wanted - log_found)).sum()
    return total / teacher.shape[:-1].numel()


@dataclass(frozen=True)
class Score:
    """A converted model beside its source on ``windows`` of ``window`` tokens of one text.

    Perplexities are exp of the mean negative log-likelihood over the predicted tokens of all windows; ``kl`` is the
    mean ``KL(source || converted)`` in nats a token, ``top1_agreement`` the share of equal most likely tokens.
    """

    text: str
    windows: int
    window: int
    perplexity_source: float
    perplexity: float
    kl: float
    top1_agreement: float
    max_abs_logit_error: float

    def as_json(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)


class Scores:
    """Sums over predicted tokens; their logits are compared and then forgotten."""

    def __init__(self) -> None:
        self.nll_source = self.nll = self.kl = 0.0
        self.agreeing = self.predicted = 0
        self.worst = 0.0

    def add(self, expected: Tensor, found: Tensor, targets: Tensor) -> None:
        """Adds ``n`` positions: logits ``[n, V]`` of source and converted model, and the tokens ``[n]`` that follow."""
        p, q = expected.log_softmax(-1), found.log_softmax(-1)
        index = targets[:, None]
        self.nll_source -= float(p.gather(1, index).cpu().double().sum())
        self.nll -= float(q.gather(1, index).cpu().double().sum())
        self.kl += float((p.exp() * (p - q)).sum(-1).cpu().double().sum())
        self.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.worst = _larger(self.worst, float((expected - found).abs().max()))
        self.predicted += len(targets)

    def __add__(self, other: Scores) -> Scores:
        """The sums over both texts together."""
        both = Scores()
        for name in ("nll_source", "nll", "kl", "agreeing", "predicted"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        both.worst = _larger(self.worst, other.worst)
        return both

    def result(self, text: str, windows: int, window: int) -> Score:
        """The means; the arguments say what was read."""
        return Score(
            text=text,
            windows=windows,
            window=window,
            perplexity_source=_exp(self.nll_source / self.predicted),
            perplexity=_exp(self.nll / self.predicted),
            kl=self.kl / self.predicted,
            top1_agreement=self.agreeing / self.predicted,
            max_abs_logit_error=self.worst,
        )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The squared error relative to the squared norm of ``wanted``; where that is 0, the squared error itself.

    Both are of any shape, the same.
    """
    error, energy = (float(states.cpu().double().square().sum()) for states in (found - wanted, wanted))
    return error / energy if energy else error


@fast_float32()
@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor, step: Callable[[], None] = lambda: None) -> float:
    """The perplexity over all predicted tokens of ``windows [N, S]``; ``step`` is called after each window.

    It is exp of the tokens' mean negative log-likelihood. A model with a coded cache reads a window from it.
    """
    total = 0.0
    for window in windows.to(model.device):
        logits = model(window[None], use_cache=is_coded(model.config)).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum"))
        step()
    return _exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def _larger(value: float, other: float) -> float:
    """The larger of the two, or NaN where one is: max() would forget it."""
    return value if value >= other or value != value else other


def _exp(value: float) -> float:
    """The exponential, infinite where that of Python would raise."""
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").exp())
