"""Answers of a checkpoint: streamed, with what they take, and beside those of its source."""

from __future__ import annotations

import io
import json
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from rich.console import Console
from tiny_source import CONTEXT, LAYERS, convert, save_source, write_text
from typer.testing import CliRunner

from conversion.answering.comparison import PARTING, Pair, compare_answers
from conversion.answering.speaker import Answer, Speaker
from conversion.cli import app

FIGURES = r"\[(\d+) tokens, \d+\.\d a second, .*B of cache for (\d+) tokens\]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``source``, and ``coded``, a conversion that caches in few bits."""
    folder = tmp_path_factory.mktemp("chat")
    save_source(folder / "source", dtype=torch.float32)
    recipe = {"cache": "30%", "tokens": 256, "calibration": str(write_text(folder / "text.txt"))}
    convert(folder / "source", folder / "coded", **recipe)
    return folder


def asked(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn} for turn in turns]


@pytest.mark.parametrize("name", ["source", "coded"])
def test_pieces_join_to_what_generate_gives(name: str, folder: Path) -> None:
    speaker, seen = Speaker(str(folder / name), "cpu"), []
    answer = speaker.answer(asked("latent"), 12, lambda so_far: seen.append(so_far.text), greedy=True)
    prompt = torch.tensor([speaker.tokenizer("latent")["input_ids"]])
    expected = speaker._model.generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :]
    assert answer.tokens == expected.tolist()
    assert answer.text == speaker.tokenizer.decode(expected, skip_special_tokens=True)
    assert seen[-1] == answer.text
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    # The last token is not cached.
    assert answer.cached == prompt.shape[1] + len(answer.tokens) - 1
    if name == "source":
        assert answer.cache_bytes == answer.cached * LAYERS * 256
    else:
        assert 0 < answer.cache_bytes < 64 * LAYERS * 256
    assert answer.seconds > 0


def test_a_conversation_is_remembered(folder: Path) -> None:
    speaker = Speaker(str(folder / "source"), "cpu")
    first, second = asked("key", "value")
    turns = [first, {"role": "assistant", "content": "head"}, second]
    assert speaker.answer(turns, 1).cached == len("keyheadvalue")
    speaker.tokenizer.chat_template = None
    assert not speaker.converses
    assert speaker.answer(turns, 1).cached == len("value")
    with pytest.raises(Exception, match=rf"\d+ tokens were said, and the model's context is {CONTEXT}"):
        speaker.answer(asked("x" * CONTEXT), 1)


def test_one_question(folder: Path) -> None:
    result = mla("chat", folder / "coded", "latent", "--tokens", 8, "--greedy")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(FIGURES, result.stderr.strip())
    speaker = Speaker(str(folder / "coded"), "cpu")
    assert result.stdout == speaker.answer(asked("latent"), 8, greedy=True).text + "\n"


def test_questions_from_standard_input(folder: Path) -> None:
    lines = "key\n\nvalue\n/new\nkey\n/quit\nnever\n"
    command = ["chat", str(folder / "coded"), "--tokens", "4", "--greedy"]
    result = CliRunner().invoke(app, command, input=lines)
    assert result.exit_code == 0, result.output
    told = [tuple(map(int, found)) for found in re.findall(FIGURES, result.stderr)]
    assert len(told) == 3
    # The second question comes behind the first and its answer; the third begins anew.
    assert told[0] == told[2]
    assert told[1][1] > told[0][1]
    assert CliRunner().invoke(app, command, input="key\n").exit_code == 0


def test_a_terminal_shows_figures_below_the_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, record=True, width=100, markup=False, emoji=False)
    # The package has the command under the name of its module.
    chat = import_module("conversion.cli.chat")
    monkeypatch.setattr(chat, "console", lambda **_: terminal)
    speaker = Speaker(str(folder / "source"), "cpu")
    answer = chat._answered(speaker, asked("latent"), 8, greedy=True)
    shown = terminal.export_text()
    assert chat._figures(answer) in shown
    assert [*answer.text][-1] in shown


def test_what_does_not_fit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.answering.speaker.free_bytes", lambda _: 1000)
    assert_refused(mla("chat", folder / "coded", "x"), "GB of memory are free on cpu", "--device")
    assert_refused(mla("chat", folder / "coder", "x"), "does not", "did you mean")


def test_side_by_side(folder: Path) -> None:
    command = ("compare", folder / "source", folder / "coded", "latent", "key", "--tokens", 10)
    found = json.loads(mla(*command, "--json").stdout)["answers"]
    assert [answer["prompt"] for answer in found] == ["latent", "key"]
    for answer in found:
        assert answer["source"]["cache_bytes"] == answer["source"]["cached"] * LAYERS * 256
        assert answer["converted"]["cache_bytes"] > 0
        assert 0 <= answer["equal_tokens"] <= 10
    itself = json.loads(mla("compare", folder / "source", folder / "source", "key", "--json").stdout)["answers"][0]
    assert itself["equal_tokens"] == itself["source"]["tokens"]
    shown = mla(*command).stdout
    assert "of cache for" in shown
    assert shown.count("latent") >= 1


def test_one_model_at_a_time_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name
            events.append(f"load {name}")

        def answer(self, turns: list, most: int, greedy: bool) -> Answer:
            return Answer(self.name)

        def __del__(self) -> None:
            events.append(f"free {self.name}")

    compare_answers([lambda: Noted("a"), lambda: Noted("b")], ["x", "y"], 1, lambda: events.append("step"))
    assert events == ["load a", "step", "step", "free a", "load b", "step", "step", "free b"]


@pytest.mark.parametrize(
    ("source", "converted", "parting"),
    [
        ("the sky is blue", "the sky is blue", None),
        ("the sky is blue", "the sky is black", 11),
        ("the sky is blue", "the sky is", 10),
        ("one", "two", 0),
    ],
)
def test_the_first_difference_is_marked(source: str, converted: str, parting: int | None) -> None:
    pair = Pair("prompt", Answer(source, [1, 2, 3]), Answer(converted, [1, 2, 4]))
    assert pair.equal_tokens == 2
    assert pair.parting == parting
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(pair.table())
    assert console.export_text().count(PARTING) == (0 if parting is None else 3)
