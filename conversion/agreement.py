"""Does a verification agree with what the method of a conversion promises? What contradicts it is not published."""

from __future__ import annotations

import math

import torch

from .verify import Verification

EXACT_LAYER_ERROR = 1e-5
EXACT_KL = 1e-4
"""Nats a token. Both are far above what the order of float32 sums changes, and far below what any wrong tensor does."""
ROUNDED_LAYER_ERROR = 16
ROUNDED_KL = 512
"""Times the squared precision of the type that weights are rounded to."""
WORST_LAYER_ERROR = 16.0
"""Of a compressed layer: its output is off by four times its own norm. Zeros alone would be off by once."""


def refuse_contradiction(
    verification: Verification, *, lossless: bool, rounded_to: torch.dtype | None, vocabulary: int
) -> None:
    """Refuses a checkpoint that is not what its method makes of a model.

    Args:
        lossless: the method changes the form of a model alone; others compress it, and must still leave more than a
            guess.
        rounded_to: the type of the weights, where some are not stored as exactly as they were computed.
        vocabulary: its size.

    Raises:
        VerificationError: a layer's error or the divergence is not finite, or above what the method may leave.
    """
    _layer_limit, _kl_limit = WORST_LAYER_ERROR, math.log(vocabulary)
    if lossless:
        squared = 0.0 if rounded_to is None else torch.finfo(rounded_to).eps ** 2
        max(EXACT_LAYER_ERROR, ROUNDED_LAYER_ERROR * squared)
        max(EXACT_KL, ROUNDED_KL * squared)
    ...
