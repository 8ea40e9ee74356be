"""The measures beyond perplexity: recall at a distance, tasks of lm-eval, windows of another length."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_source import CONTEXT, byte_tokenizer, convert, save_source, tiny_llama
from typer.testing import CliRunner

from conversion.cli import app
from conversion.errors import ConversionError
from conversion.evaluation.recall import copy_prompt, measure_recall, needle_prompt
from conversion.evaluation.tasks import evaluate_tasks

LONG = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``source`` of a longer context, and ``exact``."""
    folder = tmp_path_factory.mktemp("measures")
    save_source(folder / "source", dtype=torch.float32, max_position_embeddings=LONG)
    convert(folder / "source", folder / "exact", method="exact")
    return folder


def verify(folder: Path, *arguments: object) -> dict:
    command = ["verify", folder / "exact", "--against", folder / "source", "--windows", "1", "--json", *arguments]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


class Copier(torch.nn.Module):
    """Predicts what followed the latest earlier occurrence of the last seven tokens: it remembers everything."""

    config = SimpleNamespace(vocab_size=258)

    def forward(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int):
        row = ids[0].tolist()
        logits = torch.zeros(1, len(row), 300)
        for position in range(7, len(row)):
            seen = row[position - 6 : position + 1]
            for earlier in range(position - 1, 5, -1):
                if row[earlier - 6 : earlier + 1] == seen:
                    logits[0, position, row[earlier + 1]] = 1
                    break
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


class Forgetful(torch.nn.Module):
    config = SimpleNamespace(vocab_size=258)

    def forward(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int):
        return type("Output", (), {"logits": torch.zeros(1, logits_to_keep, 300)})


def test_needle_is_hidden_at_its_depth_and_asked_for_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    for depth, first in ((0.0, 0), (1.0, 1)):
        ids, answer = needle_prompt(tokenizer, 600, depth, random.Random(0))
        text = tokenizer.decode(ids)
        number = text[-5:]
        assert (len(ids), answer) == (600, 6)
        assert number.isdigit()
        assert text.count(f"is {number}") == 2
        assert (text.index(f"is {number}.") > 400) == first


def test_passage_stands_at_both_ends() -> None:
    ids, scored = copy_prompt(byte_tokenizer(), 600, random.Random(0), 258)
    assert len(ids) == 600
    assert torch.equal(ids[:64], ids[-64:])
    assert scored == 56
    assert ids[:64].min() > 1, "no special tokens"
    assert copy_prompt(byte_tokenizer(), 600, random.Random(0), 100)[0][:64].max() < 100, "rows of the embedding alone"


def test_a_model_that_remembers_and_one_that_does_not() -> None:
    found = measure_recall(Copier(), Forgetful(), byte_tokenizer(), 600, seed=3)  # type: ignore[arg-type]
    assert (found.needle_source, found.copy_source) == (1.0, 1.0)
    assert (found.needle, found.copy) == (0.0, 0.0)
    assert found == measure_recall(Copier(), Forgetful(), byte_tokenizer(), 600, seed=3)  # type: ignore[arg-type]


def test_context_too_short_for_a_needle() -> None:
    with pytest.raises(ConversionError, match="longer one by --context"):
        needle_prompt(byte_tokenizer(), CONTEXT, 0.5, random.Random(0))


def test_verify_at_a_longer_context(folder: Path) -> None:
    found = verify(folder, "--context", LONG, "--recall")
    assert found["window"] == LONG
    assert found["recall"]["context"] == LONG
    assert found["recall"]["copy"] == found["recall"]["copy_source"]
    result = CliRunner().invoke(
        app, ["verify", str(folder / "exact"), "--against", str(folder / "source"), "--context", str(LONG + 1)]
    )
    assert result.exit_code == 2
    assert "beyond the model's 256" in result.output


def test_every_text_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("latent " * 100)
    found = verify(folder, "--text", tmp_path / "one.txt", "--text", tmp_path / "two.txt")
    assert [domain["text"] for domain in found["domains"]] == ["one.txt", "two.txt"]


def test_both_prints_of_prose_are_reported(folder: Path) -> None:
    texts = [domain["text"] for domain in verify(folder)["domains"]]
    assert {"held-out prose", "held-out tokenised prose"} <= set(texts)


TASK = """
task: offline_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of lm-eval on a local file. The first of two answers is right."""
    rows = [{"question": f"{number} is", "choices": [" even", " odd"][:: 1 - 2 * (number % 2)]} for number in range(6)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "offline_choice.yaml"
    file.write_text(TASK.format(questions=questions))
    return file


def test_tasks_of_lm_eval(folder: Path, task: Path) -> None:
    pytest.importorskip("lm_eval")
    found = verify(folder, "--tasks", task)["tasks"]
    assert set(found) == {"offline_choice"}
    scores = found["offline_choice"]["acc"]
    assert scores["source"] == scores["converted"]
    assert 0 <= scores["source"] <= 1


def test_unknown_task_is_refused() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConversionError, match="no task 'nonsense'"):
        evaluate_tasks({"source": tiny_llama()}, byte_tokenizer(), ["nonsense"], None, 0)


def test_lm_eval_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConversionError, match=r"needs the package lm-eval .*modeling-mla\[eval\]"):
        evaluate_tasks({"source": tiny_llama()}, byte_tokenizer(), ["arc_easy"], None, 0)
