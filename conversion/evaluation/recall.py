"""Can a model still find what it read long ago? A needle in a haystack, and the copy of a passage, at a given context.

Both are synthetic, seeded and offline. Answers are not generated but scored in one forward pass: a token counts where
it is the most likely one after the true tokens before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_mla.configuration_mla import is_coded

from ..errors import CalibrationError
from ..text.default_mix import held_out_prose

SAMPLES = 8
"""Prompts of each kind: needles at so many depths, and as many copies."""
_DIGITS = 5
_PASSAGE = 64
"""Tokens to copy, at most an eighth of the context."""
_CUES = 8
"""Tokens of the repeated passage that are given before its others are scored."""
_CITIES = ("Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Tunis", "Perth", "Riga")


@dataclass(frozen=True)
class Recall:
    """Shares of 1, source and converted model, at ``context`` tokens.

    ``needle``: numbers hidden at evenly spaced depths of prose and recalled whole; ``copy``: tokens of a passage of
    random tokens, read first, when it is repeated after prose.
    """

    context: int
    samples: int
    needle_source: float
    needle: float
    copy_source: float
    copy: float

    def as_json(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)


def measure_recall(
    source: PreTrainedModel,
    converted: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    seed: int,
    step: Callable[[], None] = lambda: None,
) -> Recall:
    """Both tests with both models; ``step`` is called ``2 * SAMPLES`` times.

    Raises:
        CalibrationError: the context is too short to hide anything in.
    """
    draw = random.Random(seed)
    found: dict[str, list[float]] = {}
    for sample in range(SAMPLES):
        prompts = {
            "needle": needle_prompt(tokenizer, context, sample / max(SAMPLES - 1, 1), draw),
            "copy": copy_prompt(tokenizer, context, draw, source.config.vocab_size),
        }
        for name, (ids, answer) in prompts.items():
            for suffix, model in (("_source", source), ("", converted)):
                right = _predicted(model, ids, answer)
                share = float(right.all()) if name == "needle" else float(right.float().mean())
                found.setdefault(name + suffix, []).append(share)
            step()
    return Recall(context, SAMPLES, **{name: sum(shares) / SAMPLES for name, shares in found.items()})


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase, context: int, depth: float, draw: random.Random
) -> tuple[Tensor, int]:
    """A number stated at ``depth`` (0 the start, 1 the end) of prose and asked for at the end.

    Returns:
        Token ids ``[context]``, and how many of the last are the answer.
    """
    city, number = draw.choice(_CITIES), "".join(draw.choice("0123456789") for _ in range(_DIGITS))
    needle = _ids(tokenizer, f"\nThe secret number of {city} is {number}.\n")
    question = _ids(tokenizer, f"\nThe secret number of {city} is")
    answer = _ids(tokenizer, f" {number}")
    prose = _prose(tokenizer, context - len(needle) - len(question) - len(answer))
    place = round(depth * len(prose))
    return torch.tensor(prose[:place] + needle + prose[place:] + question + answer), len(answer)


def copy_prompt(
    tokenizer: PreTrainedTokenizerBase, context: int, draw: random.Random, vocab_size: int
) -> tuple[Tensor, int]:
    """A passage of random tokens, prose, and the passage again.

    ``vocab_size`` is the number of rows of the embedding: fewer than the tokenizer has tokens where some were added.

    Returns:
        Token ids ``[context]``, and how many of the last are scored.
    """
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(min(len(tokenizer), vocab_size)) if token not in special]
    length = min(_PASSAGE, context // 8)
    passage = [draw.choice(vocabulary) for _ in range(length)]
    prose = _prose(tokenizer, context - 2 * length)
    return torch.tensor(passage + prose + passage), length - min(_CUES, length // 2)


def _prose(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """``length`` tokens of held-out prose, repeated where it is shorter."""
    if length < 1:
        raise CalibrationError("the context is too short for a needle in a haystack; give a longer one by --context.")
    ids = _ids(tokenizer, held_out_prose())
    return (ids * (length // len(ids) + 1))[:length]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@torch.inference_mode()
def _predicted(model: PreTrainedModel, ids: Tensor, answer: int) -> Tensor:
    """Which of the last ``answer`` tokens are the most likely ones, ``[answer]``."""
    logits = model(ids[None], use_cache=is_coded(model.config), logits_to_keep=answer + 1).logits[0, :-1]
    return logits.argmax(-1) == ids[-answer:]
