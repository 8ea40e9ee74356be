"""What a sweep found: ``report.json``, from which the page and the picture are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..evaluation.continuations import Continuation
from ..evaluation.scores import Score
from ..evaluation.verify import Verification

PICTURE_NAME = "sweep.png"
CONTEXTS = (1024, 32768, 131072)
"""Tokens at which memory and speed are told."""

ByContext = dict[str, float | None]


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Closeness(_Figures):
    """How close predictions are to the source's, see `conversion.evaluation.scores.Score`."""

    perplexity: float
    kl: float
    top1_agreement: float


class Domain(Closeness):
    """The same on one text."""

    text: str
    perplexity_source: float

    @classmethod
    def of(cls, score: Score) -> Domain:
        """The figures of a score that are kept."""
        return cls(**{name: getattr(score, name) for name in cls.model_fields})


class QuantisedSource(Closeness):
    """The source that reads its own cache in ``bits``, in KIVI's form, which is ``bytes_share`` of it."""

    bits: int
    bytes_share: float


class Size(Closeness):
    """One conversion.

    ``cache`` is what was asked for, ``precision`` how it is kept: the model's type, or the bits of a latent's and of a
    rotary key's values. ``bytes_share`` is all that the cache holds for a window, of what the source's holds.
    ``continuations`` are those of the verification, of ``greedy_tokens`` together; none where the models were not
    loaded whole. ``folder`` is the checkpoint's, None where it was not kept. ``memory`` are bytes of one sequence,
    ``decode_ms`` milliseconds of a step, by the tokens that are cached; None where that was not measured.
    """

    cache: str
    precision: str
    bytes_share: float
    domains: list[Domain]
    greedy_tokens: int
    continuations: list[Continuation]
    folder: str | None
    memory: dict[str, int]
    decode_ms: ByContext | None


class SourceFigures(_Figures):
    """The source's own, as in `Size`."""

    perplexity: float
    cache_bytes_per_token: int
    memory: dict[str, int]
    decode_ms: ByContext | None


class SourceName(_Figures):
    """The source as others know it; ``revision`` is that of a repository of the Hub."""

    name: str
    revision: str | None


class SweepResult(_Figures):
    """A finished sweep.

    Figures are of ``windows`` of ``window`` tokens of ``text``, which no default calibration reads. ``dtype`` is that
    of the weights that were written. ``recommended`` is the ``cache`` of one of the ``sizes``. ``refused`` are sizes
    that gave nothing to publish, with the reason. ``seconds`` are those of all runs that it took.
    """

    kind: Literal["sweep"] = "sweep"
    source: SourceName
    text: str
    windows: int
    window: int
    dtype: str
    source_figures: SourceFigures
    sizes: list[Size]
    quantised_source: list[QuantisedSource]
    refused: dict[str, str] = {}
    recommended: str
    recommendation: str
    seconds: float
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return self.model_dump(mode="json")


def size_of(
    cache: str,
    precision: str,
    found: Verification,
    folder: str | None,
    memory: Mapping[str, int],
) -> Size:
    """One conversion, by its verification; not timed."""
    whole = found.whole_model
    return Size(
        cache=cache,
        precision=precision,
        bytes_share=found.cache_bytes_held / (found.window * found.cache_bytes_per_token_source),
        perplexity=found.perplexity,
        kl=found.kl,
        top1_agreement=found.top1_agreement,
        domains=[Domain.of(domain) for domain in found.domains],
        greedy_tokens=0 if whole is None else whole.greedy_tokens,
        continuations=[] if whole is None else list(whole.continuations),
        folder=folder,
        memory=dict(memory),
        decode_ms=None,
    )
