"""Does a verification agree with what the method of a conversion promises? What contradicts it is not published."""

from __future__ import annotations

import torch

from ..errors import VerificationError
from .verify import Verification

EXACT_LAYER_ERROR = 1e-5
EXACT_KL = 1e-4
"""In nats a token. Another order of float32 sums changes far less than these two limits, a wrong tensor far more."""
ROUNDED_LAYER_ERROR = 4
ROUNDED_KL = 64
"""Both in squared precisions of the type that weights were rounded to; ten times what models show."""
ROUTED_KL = 4
"""In precisions of that type, of a model that chooses experts: for such a share of tokens rounding chooses others. Four
times what tiny random models show."""
WORST_LAYER_ERROR = 16
"""Of a compressed layer, whose output is then off by four times its own norm; zeros would be off by once its norm."""
WORST_PERPLEXITY = 4
"""Times the source's, of a compressed model whose source is itself no better than an even guess."""


def refuse_contradiction(
    verification: Verification, *, lossless: bool, rounded_to: torch.dtype | None, vocabulary: int, routed: bool = False
) -> None:
    """Refuses a checkpoint that its method should not have made.

    Args:
        verification: what was measured of the checkpoint.
        lossless: the method changes the form of a model alone. Others compress it, and leave more than an even guess
            among all tokens.
        rounded_to: the type of the weights where some are not stored as they were computed.
        vocabulary: tokens of the model.
        routed: the model chooses experts for every token.

    Raises:
        VerificationError: what was found is above what the method may leave.
    """
    if lossless:
        precision = 0.0 if rounded_to is None else torch.finfo(rounded_to).eps
        layer_limit = max(EXACT_LAYER_ERROR, ROUNDED_LAYER_ERROR * precision**2)
        kl_limit = max(EXACT_KL, ROUNDED_KL * precision**2, ROUTED_KL * precision if routed else 0.0)
        advice = "report this source as one that is converted wrongly"
        if rounded_to is not None:
            advice = f"keep the source's type instead of {str(rounded_to).removeprefix('torch.')}, or {advice}"
        for domain in verification.domains:
            _refuse_above(kl_limit, domain.kl, f"the KL to the source on {domain.text}, in nats a token,", advice)
    else:
        layer_limit, advice = WORST_LAYER_ERROR, "ask for a larger cache, or calibrate on more text"
        perplexity_limit = max(vocabulary, WORST_PERPLEXITY * verification.perplexity_source)
        _refuse_above(perplexity_limit, verification.perplexity, "the perplexity", advice)
    for layer, error in enumerate(verification.layer_errors):
        _refuse_above(layer_limit, error, f"the relative squared error of layer {layer}'s attention output", advice)


def _refuse_above(limit: float, found: float, what: str, advice: str) -> None:
    if not found <= limit:
        raise VerificationError(
            f"{what} is {_shown(found)}, above the {_shown(limit)} that the method may leave; nothing is published: "
            f"{advice}."
        )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
