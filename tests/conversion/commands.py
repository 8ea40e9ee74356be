"""`mla` run within the test, and what a refusal looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conversion.cli import app

LONGEST = 300


def mla(*arguments: object, charset: str = "utf-8") -> Result:
    """Runs a command; ``charset`` is the terminal's."""
    return CliRunner(charset=charset).invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *fragments: str) -> None:
    """One short line on stderr that has the fragments, and the exit code of bad input."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code not in (0, 1), result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < LONGEST, lines[0]
    assert "Traceback" not in result.output
    for fragment in fragments:
        assert fragment in lines[0]


def edit_json(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; ``...`` removes one."""
    values = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}), encoding="utf-8")


def edit_tensors(source: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the weights of a checkpoint with one file."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
