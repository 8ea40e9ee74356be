"""A hundred mutants of tiny checkpoints are converted rightly or refused clearly; and a fault would be seen."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import fuzz
import pytest
import torch
from commands import edit_json, edit_tensors
from fuzz import FAULTS, Worker, try_mutants
from fuzz_outcomes import Mutant, OpenedFiles, Outcome, judge, what_is_wrong
from fuzz_sources import SECRET
from tiny_source import convert, save_source

SEED = 0
MUTANTS = 100
PARTS = 2
"""Shared among processes; each starts one of its own."""


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_mutants_are_converted_rightly_or_refused_clearly(part: int) -> None:
    mutants = list(try_mutants(SEED, range(part, MUTANTS, PARTS)))
    assert [str(mutant) for mutant in mutants if mutant.outcome in FAULTS] == []
    assert {mutant.outcome for mutant in mutants} == {Outcome.RIGHT, Outcome.REFUSED}


def test_wrong_publication_is_seen(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    output = convert(source, tmp_path / "out", method="exact").output
    assert what_is_wrong(source, output, exact=True) is None
    edit_json(output / "generation_config.json", x=SECRET)
    assert "generation_config.json" in str(what_is_wrong(source, output, exact=True))
    edit_json(output / "generation_config.json", x=...)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    edit_tensors(output, lambda tensors: tensors[name].mul_(1.05))
    assert "logits differ" in str(what_is_wrong(source, output, exact=True))
    assert what_is_wrong(source, output, exact=False) is None
    edit_tensors(output, lambda tensors: tensors["model.norm.weight"].mul_(1.05))
    assert "model.norm.weight" in str(what_is_wrong(source, output, exact=False))
    (source / "config.json").unlink()
    assert "does not load the source" in str(what_is_wrong(source, output, exact=True))


def test_reading_outside_is_seen(tmp_path: Path) -> None:
    for name in ("read", "left"):
        (tmp_path / name).write_text("x")
    watch = OpenedFiles(tmp_path)
    os.stat(tmp_path / "left")
    (tmp_path / "read").read_text()
    assert watch.names() == ["read"]


@pytest.mark.parametrize(
    ("code", "stderr", "left", "opened", "outcome"),
    [
        (2, "error: no.\n", [], [], Outcome.REFUSED),
        (2, "error: no.\n", [".out.partial"], [], Outcome.LEFT),
        (2, "error: no.\n", [], ["model.safetensors"], Outcome.OUTSIDE),
        (1, "error: internal error.\n", [], [], Outcome.INTERNAL),
        (2, "", [], [], Outcome.INTERNAL),
        (2, "error: " + "x" * 300, [], [], Outcome.INTERNAL),
        (2, "Traceback\nerror: no.\n", [], [], Outcome.INTERNAL),
        (0, "", ["out", ".out.partial"], [], Outcome.WRONG),
    ],
)
def test_refusals_are_judged(code: int, stderr: str, left: list[str], opened: list[str], outcome: Outcome) -> None:
    assert judge(code, stderr, left, opened, Path("source"), Path("out"), exact=True)[0] == outcome


def _answer_spin_die(connection: Connection, seed: int, sound: Path) -> None:
    connection.send(None)
    for index in iter(connection.recv, None):
        while index == 1:
            pass
        if index == 2:
            os._exit(1)
        connection.send(Mutant(seed, index, "", Outcome.RIGHT, ""))


def test_hang_and_death_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    worker = Worker(0, tmp_path, _answer_spin_die)
    assert [worker.run(index).outcome for index in range(3)] == [Outcome.RIGHT, Outcome.HANG, Outcome.INTERNAL]
    worker.close()
