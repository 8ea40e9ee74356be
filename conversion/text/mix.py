"""Texts by weight: what a healing learns from, and the domains by which it is judged."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint.paths import expanded
from ..errors import CalibrationError
from . import SELF_WRITTEN
from .default_mix import calibration_documents, turns
from .windows import documents_of, head, pack, pages_of, tokenised

DEFAULT = "default"
"""The text that a conversion calibrates on, as a source of a mix."""
VALIDATION_WINDOWS = 2
"""Of every domain, which are not learnt from."""
_PAGE = 32_768
"""Characters that are shuffled together: long windows need long texts."""
_CHARACTERS_PER_TOKEN = 8
"""Upper estimate: so much of a page is held back for a window."""
_PAGES = 8 * VALIDATION_WINDOWS
"""At least so many pages make a text, if it is short."""


@dataclass(frozen=True)
class WeightedText:
    """One source of a mix.

    Args:
        spec: as for `load_windows`, or `DEFAULT`, or `SELF_WRITTEN`.
        weight: of its text among all.
    """

    spec: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What others may read: of a file its name without the path on this machine."""
        path = expanded(self.spec)
        return path.name if path.exists() else self.spec

    @classmethod
    def parse(cls, written: str) -> WeightedText:
        """``SPEC`` or ``SPEC:WEIGHT``, as ``a.txt:0.3`` or ``name@config:split:column:0.7``.

        Raises:
            CalibrationError: the weight is not above 0.
        """
        spec, _, last = written.rpartition(":")
        try:
            weight = float(last)
        except ValueError:
            return cls(written)
        if not (spec and 0 < weight < math.inf):
            raise CalibrationError(f"data {written!r} has the weight {last}; give one above 0, as a.txt:0.3.")
        return cls(spec, weight)


@dataclass(frozen=True)
class Domain:
    """One kind of text in a mix.

    Args:
        name: for reports.
        weight: of its text in the mix; 0 where a model is only judged by it.
        validation: token ids ``[M, S]``, which are not learnt from.
        windows: gives token ids ``[N, S]`` to learn from in windows of so many tokens, none where it has no such.
    """

    name: str
    weight: float
    validation: Tensor
    windows: Callable[[int], Tensor]


def load_mix(
    texts: Iterable[WeightedText],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    tokens: int,
    seed: int,
) -> list[Domain]:
    """The domains of a mix; those of the default text are always among them, if only to be judged by.

    Args:
        texts: to learn from.
        tokenizer: of the model.
        window: tokens in a window of validation.
        tokens: to learn from, of all texts together; texts that have fewer begin again.
        seed: of the shuffle.

    A source `SELF_WRITTEN` is left out: what it is takes a model, see `written_domain`.

    Raises:
        CalibrationError: see `load_windows`; a text is too short to hold some of it back.
    """
    texts = list(texts)
    total = sum(text.weight for text in texts)
    shares = [WeightedText(text.spec, text.weight / total) for text in texts]
    default = sum(share.weight for share in shares if share.spec == DEFAULT)
    domains = _default_domains(default, tokenizer, window, tokens, seed)
    for share in shares:
        if share.spec not in (DEFAULT, SELF_WRITTEN):
            wanted = math.ceil(share.weight * tokens)
            documents = head(documents_of(share.spec, tokenizer, seed), wanted + VALIDATION_WINDOWS * window)
            name = _unlike(share.name, [domain.name for domain in domains])
            domains.append(_text_domain(name, share.weight, documents, tokenizer, window, wanted, seed))
    return domains


def _default_domains(
    weight: float, tokenizer: PreTrainedTokenizerBase, window: int, tokens: int, seed: int
) -> list[Domain]:
    """Shares go by the square roots of the lengths: of many steps a short text would be learnt by heart."""
    documents = {name: calibration_documents(name, tokenizer) for name in dict.fromkeys(turns(tokenizer))}
    lengths = {name: math.sqrt(sum(map(len, texts))) for name, texts in documents.items()}
    whole = sum(lengths.values())
    return [
        _text_domain(name, weight * lengths[name] / whole, texts, tokenizer, window, tokens, seed)
        for name, texts in documents.items()
    ]


def _text_domain(
    name: str,
    weight: float,
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    tokens: int,
    seed: int,
) -> Domain:
    size = min(_PAGE, sum(map(len, documents)) // _PAGES + 1)
    pages = [part for document in documents for page in pages_of(document, size) for part in _parts(page, size)]
    random.Random(seed).shuffle(pages)
    held_back: list[int] = []
    rest: list[str] = []
    while pages and len(held_back) < VALIDATION_WINDOWS * window:
        page = pages.pop()
        held_back += tokenised(page[: _CHARACTERS_PER_TOKEN * window], tokenizer)[:window]
        rest.append(page[_CHARACTERS_PER_TOKEN * window :])
    pages += filter(None, rest)
    if not pages or len(held_back) < VALIDATION_WINDOWS * window:
        raise CalibrationError(
            f"{name} is too short: of its text {VALIDATION_WINDOWS} windows of {window} tokens are for validation "
            "alone; give a longer one."
        )

    def windows(length: int) -> Tensor:
        return pack(pages, tokenizer, length, max(1, tokens // length), seed)

    validation = torch.tensor(held_back[: VALIDATION_WINDOWS * window], device="cpu").view(-1, window)
    return Domain(name, weight, validation, windows)


def _unlike(name: str, others: list[str]) -> str:
    """``name``, or what tells it from others of that name."""
    number = 2
    while name in others:
        name, number = f"{name.removesuffix(f' ({number - 1})')} ({number})", number + 1
    return name


def _parts(page: str, size: int) -> list[str]:
    """A page without line ends may be a whole text."""
    return [page[start : start + size] for start in range(0, len(page), size)] if len(page) > 2 * size else [page]


def beginnings(domains: Sequence[Domain], window: int, count: int) -> Tensor:
    """``[count, S]`` windows of all domains, evenly spread; some come again where there are fewer."""
    windows = torch.cat([domain.windows(window) for domain in domains])
    return windows[torch.linspace(0, len(windows) - 1, count, device="cpu").long()]


def written_domain(weight: float, written: Tensor) -> Domain:
    """Text ``[N, S]`` that a model wrote itself; of another length there is none."""

    def windows(length: int) -> Tensor:
        return written[VALIDATION_WINDOWS:] if length == written.shape[1] else written.new_empty(0, length)

    return Domain("self-written", weight, written[:VALIDATION_WINDOWS], windows)
