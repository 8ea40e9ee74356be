"""How two models go on with the same texts, greedily and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..devices.choice import CPU

TEXTS = 3
"""The first window of so many texts is gone on with."""
PROMPT_TOKENS = 32
GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Continuation:
    """What source and converted model make of the first tokens of a text.

    ``equal_tokens`` are those before the first one that differs.
    """

    text: str
    prompt: str
    source: str
    converted: str
    equal_tokens: int


def prompts_of(windows: Tensor) -> tuple[Tensor, int]:
    """The prompts ``[N, P]`` at the start of ``windows [N, S]``, and how many tokens of continuation fit behind."""
    length = windows.shape[1]
    prompts = windows[:, : min(PROMPT_TOKENS, length // 2)]
    return prompts, min(GREEDY_TOKENS, length - prompts.shape[1])


def greedy(model: PreTrainedModel, prompts: Tensor, count: int) -> Tensor:
    """``[N, count]`` greedy continuation tokens, the end token excluded so that there are always ``count``."""
    prompts = prompts.to(model.device)
    # Caches of Transformers begin on the default device.
    with CPU:
        generated = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            num_beams=1,
            min_new_tokens=count,
            max_new_tokens=count,
        )
    return generated[:, prompts.shape[1] :].cpu()


def side_by_side(
    names: Sequence[str], prompts: Tensor, expected: Tensor, found: Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[Continuation, ...]:
    """What both models said, as text.

    Args:
        names: of the texts.
        prompts: token ids ``[N, P]``.
        expected: what the source went on with, token ids ``[N, S]``.
        found: the same of the converted model.
        tokenizer: of both.
    """
    said = [tokenizer.batch_decode(tokens) for tokens in (prompts, expected, found)]
    equal = map(leading_equal, expected, found)
    return tuple(Continuation(*row) for row in zip(names, *said, equal, strict=True))


def leading_equal(expected: Tensor, found: Tensor) -> int:
    """How many tokens ``[S]`` are equal before the first one that differs."""
    differing = (expected != found).nonzero()
    return len(expected) if len(differing) == 0 else int(differing[0, 0])
