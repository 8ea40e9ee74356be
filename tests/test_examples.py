"""The examples of decoding, each run in a small form as a user runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_training_examples import LONGEST, TEMPLATE, example
from tiny_source import convert, save_source, write_text

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "latent key value"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    source = save_source(folder / "source", torch.float32, max_position_embeddings=512)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    convert(source, folder / "out", method="exact")
    return folder


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length >= LONGEST} == {}


def test_batch(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a\nlatent key value\nquery of the head\n")
    told = example(folder, EXAMPLES / "batch.py", "out", "prompts.txt", "--tokens", 4)
    assert told.count(" -> ") == 3
    assert "[3 sequences in" in told


def test_static_cache(folder: Path) -> None:
    told = example(folder, EXAMPLES / "static_cache.py", "out", PROMPT, "--tokens", 4, "--backend", "eager")
    assert "the same tokens" in told


def test_few_bits(folder: Path) -> None:
    told = example(folder, EXAMPLES / "few_bits.py", "out", PROMPT, "--tokens", 4)
    sizes = [float(line.split("│")[2]) for line in told.splitlines() if re.match(r"│ (16|8|4)\s", line)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert "4 of 4" in told


def test_assisted(folder: Path) -> None:
    """A draft that is the model itself is always right."""
    told = example(folder, EXAMPLES / "assisted.py", "out", "out", PROMPT, "--tokens", 12)
    assert "the same tokens" in told
    alone, assisted = map(int, re.findall(r"(\d+) (?:passes|assisted)", told))
    assert (alone, assisted < alone) == (12, True)


def test_long_context_reads_a_document_once(folder: Path) -> None:
    write_text(folder / "document.txt", 300)
    command = (EXAMPLES / "long_context.py", "out", "document.txt", "Which key?", "--tokens", 4, "--prefix", "p.st")
    first = example(folder, *command)
    again = example(folder, *command)
    assert "tokens read in" in first
    assert "tokens read in" not in again
    answers = [re.search(r"Which key\? (.*) \[", told)[1] for told in (first, again)]
    assert answers[0] == answers[1]
    write_text(folder / "document.txt", 200)
    with pytest.raises(AssertionError, match="holds another document"):
        example(folder, *command)


def test_long_context_takes_the_shape_of_a_released_model(folder: Path) -> None:
    write_text(folder / "document.txt", 300)
    shape = EXAMPLES.parent / "hub_configs" / "minicpm3-4b.json"
    options = ("--tokens", 2, "--prefix", "shape.st", "--latent-bits", 4)
    told = example(folder, EXAMPLES / "long_context.py", shape, "document.txt", "Which?", *options)
    held = float(re.search(r"([\d.]+) MiB of latents", told)[1])
    expanded = float(re.search(r"([\d.]+) MiB\.", told)[1])
    # 40 heads of 96 + 64 values in two bytes, instead of 288 values in half a byte, scales, and a few first tokens.
    assert held < expanded / 40


def test_long_context_refuses_what_the_model_does_not_reach(folder: Path) -> None:
    write_text(folder / "longer.txt", 600)
    with pytest.raises(AssertionError, match=r"\d+ tokens, the model reads 512"):
        example(folder, EXAMPLES / "long_context.py", "out", "longer.txt", "Which?", "--prefix", "longer.st")


def test_serve_transformers(folder: Path) -> None:
    told = example(folder, EXAMPLES / "serve_transformers.py", "out", "--prompt", "key")
    assert told.count(" -> ") == 4
