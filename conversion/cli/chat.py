"""``mla chat``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from ..terminal import console
from .options import Device

if TYPE_CHECKING:
    from ..answering.speaker import Answer, Speaker, Turn

_ENDS = ("/quit", "/exit")
_ANEW = "/new"
_PROMPT = "> "


def chat(
    model: Annotated[str, typer.Argument(help="A checkpoint, converted or not: a folder, a .gguf file or a Hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="One question; without it a conversation begins.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the most likely token.")] = False,
    device: Device = "auto",
) -> None:
    """Talks with a checkpoint, and shows what its cache holds and how fast it is.

    Example: mla chat out "What is the capital of France?"
    """
    from ..answering.speaker import Speaker

    speaker = Speaker(model, device)
    if prompt is not None:
        _answered(speaker, [{"role": "user", "content": prompt}], tokens, greedy=greedy)
        return
    _converse(speaker, tokens, greedy=greedy)


def _converse(speaker: Speaker, tokens: int, *, greedy: bool) -> None:
    """Answers line after line of standard input."""
    asked = sys.stdin.isatty()
    if asked:
        kind = "" if speaker.converses else " It has no chat template, and goes on with each text by itself."
        console(stderr=True).print(f"{_ANEW} begins anew, {_ENDS[0]} ends.{kind}", soft_wrap=True)
    turns: list[Turn] = []
    while True:
        try:
            said = input(_PROMPT if asked else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if said in _ENDS:
            return
        if said == _ANEW:
            turns.clear()
        elif said:
            turns.append({"role": "user", "content": said})
            try:
                answer = _answered(speaker, turns, tokens, greedy=greedy)
            except KeyboardInterrupt:
                # It ends the answer, not the conversation.
                turns.pop()
                continue
            turns.append({"role": "assistant", "content": answer.text})


def _answered(speaker: Speaker, turns: list[Turn], tokens: int, *, greedy: bool) -> Answer:
    """Shows the answer while it comes: on a terminal with its figures below, elsewhere alone, and those on stderr."""
    terminal = console()
    if terminal.is_terminal:
        with Live(console=terminal, transient=True, vertical_overflow="ellipsis") as live:
            answer = speaker.answer(turns, tokens, lambda so_far: live.update(_with_figures(so_far)), greedy=greedy)
        terminal.print(_with_figures(answer))
        return answer
    written = 0

    def write(so_far: Answer) -> None:
        nonlocal written
        sys.stdout.write(so_far.text[written:])
        sys.stdout.flush()
        written = len(so_far.text)

    answer = speaker.answer(turns, tokens, write, greedy=greedy)
    sys.stdout.write("\n")
    console(stderr=True).print(_figures(answer), soft_wrap=True)
    return answer


def _with_figures(answer: Answer) -> Group:
    return Group(Text(answer.text), Text(_figures(answer), style="dim"))


def _figures(answer: Answer) -> str:
    held = f"{decimal(answer.cache_bytes)} of cache for {answer.cached} tokens"
    return f"[{len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} a second, {held}]"
