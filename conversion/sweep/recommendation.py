"""What a sweep comes to, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from .result import QuantisedSource, Size

LITTLE, HEALABLE = 0.1, 0.5
"""Nats a token to the source: what hardly anybody notices, and what half an hour of healing brings near to it."""
_EQUAL = 0.005
"""Nats a token to the source, below which nothing is left to heal."""
MINUTES = 30


def recommended(sizes: Sequence[Size]) -> Size:
    """The smallest size that loses little, or that can be healed, or else the closest one; of one size at least."""
    for limit in (LITTLE, HEALABLE):
        good = [size for size in sizes if size.kl <= limit]
        if good:
            return min(good, key=lambda size: size.bytes_share)
    return min(sizes, key=lambda size: size.kl)


def heal_command(checkpoint: str, source: str) -> str:
    """What brings a checkpoint nearer to its source."""
    return f"mla heal {checkpoint} --teacher {source} --minutes {MINUTES}"


def recommendation(
    source: str, folder: str, perplexity_source: float, sizes: Sequence[Size], quantised: Sequence[QuantisedSource]
) -> str:
    """One sentence: which size, what it keeps, what brings it nearer, and what does as well without a conversion.

    Args:
        source: its name.
        folder: the sweep's.
        perplexity_source: of the source.
        sizes: of the sweep, at least one.
        quantised: the source with its own cache in few bits.
    """
    best = recommended(sizes)
    times = best.perplexity / perplexity_source
    said = (
        f"{best.cache}, in {best.precision}, keeps {best.top1_agreement:.0%} of the source's most likely tokens at "
        f"{times:.2f} times its perplexity"
    )
    if best.kl > _EQUAL:
        made = "" if best.folder else f"`mla convert {source} {folder}/{best.cache} --cache {best.cache}` and "
        said += f"; {made}`{heal_command(f'{folder}/{best.cache}', source)}` brings it nearer"
    as_good = [form for form in quantised if form.bytes_share <= best.bytes_share and form.kl <= best.kl]
    if as_good:
        form = min(as_good, key=lambda form: form.kl)
        said += f"; the source's own cache in {form.bits} bits is as small ({form.bytes_share:.0%}) and no farther off"
    return f"{said}."
