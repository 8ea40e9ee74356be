"""Two checkpoints answer the same prompts, greedily: where do they part, and what does either hold?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .speaker import Answer, Speaker

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that reverses a string.",
    "Explain in two sentences why the sky is blue.",
)
"""Where the user names none."""
_WORDS = re.compile(r"\s+|\S+")
PARTING = "▶"
"""Stands before the first word that differs."""


@dataclass(frozen=True)
class Pair:
    """The answers of both to one prompt."""

    prompt: str
    source: Answer
    converted: Answer

    @property
    def equal_tokens(self) -> int:
        """How many there are before the first one that differs."""
        pairs = zip(self.source.tokens, self.converted.tokens, strict=False)
        return next((place for place, (a, b) in enumerate(pairs) if a != b), self._shortest)

    @property
    def _shortest(self) -> int:
        return min(len(self.source.tokens), len(self.converted.tokens))

    @property
    def parting(self) -> int | None:
        """The character at which the first word begins that differs; None where there is none."""
        if self.source.text == self.converted.text:
            return None
        words = zip(*(_WORDS.findall(answer.text) for answer in (self.source, self.converted)), strict=False)
        return sum(len(word) for word, _ in takewhile(lambda pair: pair[0] == pair[1], words))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        answers = {"source": self.source, "converted": self.converted}
        told = {
            name: {"text": of.text, "tokens": len(of.tokens), "cached": of.cached, "cache_bytes": of.cache_bytes}
            for name, of in answers.items()
        }
        return {"prompt": self.prompt, "equal_tokens": self.equal_tokens} | told

    def table(self) -> Table:
        """What the terminal shows: both side by side, with a mark where they part."""
        table = Table(title=self.prompt, title_justify="left", expand=True, show_lines=True)
        table.add_column("source", ratio=1)
        table.add_column("converted", ratio=1)
        table.add_row(*(self._marked(answer.text) for answer in (self.source, self.converted)))
        table.add_row(*(_held(answer) for answer in (self.source, self.converted)))
        said = f"the first {self.equal_tokens} tokens are equal"
        table.caption = "Equal to the end." if self.parting is None else f"{PARTING} is where they part: {said}."
        return table

    def _marked(self, text: str) -> Text:
        if self.parting is None:
            return Text(text)
        return Text.assemble(text[: self.parting], (f"{PARTING}{text[self.parting :]}", "bold yellow"))


def _held(answer: Answer) -> str:
    return f"{decimal(answer.cache_bytes)} of cache for {answer.cached} tokens"


def compare_answers(
    load: Sequence[Callable[[], Speaker]], prompts: Sequence[str], most: int, step: Callable[[], None]
) -> list[Pair]:
    """Answers all prompts by the one and then by the other.

    Args:
        load: load the source and the converted checkpoint; one at a time is in memory.
        prompts: each is answered by itself.
        most: tokens of an answer.
        step: called after each answer.
    """
    answers: list[list[Answer]] = []
    for speaker in (one() for one in load):
        answers.append([])
        for prompt in prompts:
            answers[-1].append(speaker.answer([{"role": "user", "content": prompt}], most, greedy=True))
            step()
        del speaker
    return [Pair(*row) for row in zip(prompts, *answers, strict=True)]
