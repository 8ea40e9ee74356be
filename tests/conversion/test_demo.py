"""``make demo`` on a tiny model: convert, verify, and answer in a process without the package."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from prepared_processes import run_prepared
from tiny_source import convert, save_source

_EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: object) -> CompletedProcess[str]:
    return run_prepared(_EXAMPLES / script, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    # The demo reads all of the default text, which short windows would cut into a thousand.
    save_source(folder / "source", dtype=torch.float32, max_position_embeddings=1024)
    return folder


@pytest.mark.long
def test_demo_answers_and_replaces_an_earlier_one(folder: Path) -> None:
    convert(folder / "source", folder / "out", method="exact")
    finished = run("demo.py", folder / "source", folder / "out", "--cache", "75%", "--prompt", "Hello")
    assert finished.returncode == 0, finished.stderr
    for line in ("cache, bytes a token", "perplexity", "seconds", "peak memory", "> Hello"):
        assert line in finished.stdout
    assert "modeling_mla cannot be imported here" in finished.stdout
    assert "model class: transformers_modules.out." in finished.stdout
    assert json.loads((folder / "out" / "report.json").read_text())["recipe"]["cache"] == "75%"


def test_demo_replaces_nothing_that_it_did_not_make(folder: Path) -> None:
    (folder / "mine").mkdir()
    finished = run("demo.py", folder / "source", folder / "mine")
    assert finished.returncode == 1
    assert finished.stderr.strip().endswith("choose another output, or move it away.")
    assert (folder / "mine").is_dir()
