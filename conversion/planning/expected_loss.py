"""What a conversion is expected to cost before it is measured: what is cut off, what is rounded, what is unlearnt.

In nats a token, as a model of 135 million parameters has them. They are for choosing, and for telling what a choice is
worth: what a conversion does cost is measured when it is verified.
"""

from __future__ import annotations

from ..methods.preparation import rounding_power

_RANK_LOSS = 0.21
_LATENT_ROUNDING = 0.8
_ROPE_ROUNDING = 6.0
"""Uncoded at shares of 1/8 to 3/4; at half of the values with latents of 2 to 6 bits, and with rotary keys of 5 and 6
[measured]."""
_UNLEARNT = 14_400
"""Tokens of text that leave unlearnt as much again as is lost anyway: from 32k tokens to 64k, a conversion to half of
the values loses 0.021 nats less, and one to a quarter 0.109 [measured]."""


def loss_of_cutting(share: float) -> float:
    """What a layer loses of the model by keeping only ``share`` of the source's values, above 0."""
    return _RANK_LOSS * max(0.0, 1 - share) ** 2 / share


def expected_loss(share: float, latent_bits: int, rope_bits: int) -> float:
    """What a layer's budget is expected to cost, calibrated on enough text.

    Args:
        share: of the source's values that are cached, above 0.
        latent_bits: of a latent's value.
        rope_bits: of a value of the rotary key.
    """
    rounded = _LATENT_ROUNDING * rounding_power(latent_bits, 128) + _ROPE_ROUNDING * rounding_power(rope_bits, 48)
    return loss_of_cutting(share) + rounded


def saved_by_twice_the_text(share: float, tokens: int) -> float:
    """How much less it would cost to have calibrated on ``2 * tokens``: what is unlearnt falls as the text grows.

    Args:
        share: of the source's values that are cached, above 0.
        tokens: of the text, at least 1.
    """
    return loss_of_cutting(share) * _UNLEARNT / tokens / 2
