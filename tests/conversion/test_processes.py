"""Two processes, started as a launcher starts them, share a conversion's text, its result and its refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import mla
from safetensors.torch import load_file
from tiny_source import convert, save_source, write_text
from two_processes import run_in_two

from conversion.devices.processes import Processes
from conversion.errors import OutputError
from conversion.forward.hidden_states import HiddenStates
from conversion.methods.attention_statistics import ROWS_PER_WINDOW
from conversion.reporting.report_files import JSON_NAME

SHARING = ("attention_aware", "transmla")
"""One that refits and one that measures twice."""
WINDOW = 2 * ROWS_PER_WINDOW
"""So that rows are sampled in each."""
TOKENS = 20 * WINDOW
"""Three blocks of windows, of which the first process has two."""
ROUNDING = 1e-6
"""Relative to the largest value of a tensor: float64 sums in another order, seen through eigenvectors in float32."""


def recipe(folder: Path, method: str) -> dict[str, Any]:
    return {"method": method, "cache": "60%", "calibration": str(folder / "text.txt"), "tokens": TOKENS}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    save_source(tmp_path / "source", torch.float32, max_position_embeddings=WINDOW)
    write_text(tmp_path / "text.txt")
    return tmp_path


def convert_both_ways(folder: Path) -> None:
    for method in SHARING:
        convert(folder / "source", folder / method, **recipe(folder, method))


@pytest.mark.long
def test_the_result_is_that_of_one_process(prepared: Path) -> None:
    run_in_two(convert_both_ways, prepared)
    for method in SHARING:
        alone = convert(prepared / "source", prepared / f"{method}-alone", **recipe(prepared, method)).output
        folders = (prepared / method, alone)
        found, expected = (load_file(folder / "model.safetensors") for folder in folders)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            off = (found[name] - tensor).abs().max() / tensor.abs().max()
            assert off < ROUNDING, (method, name, off)
        told, wanted = (json.loads((folder / JSON_NAME).read_text("utf-8"))["verification"] for folder in folders)
        for name in ("perplexity_source", "perplexity", "kl", "top1_agreement", "route_error"):
            assert told[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-6), (method, name)
        assert told["layer_errors"] == pytest.approx(wanted["layer_errors"], rel=1e-5)
    assert not [path for path in prepared.iterdir() if path.name.startswith(".")]


def end_in_one(folder: Path) -> None:
    """What both processes say where one of them refuses, or fails, or both are refused the same."""
    rank, write = int(os.environ["RANK"]), HiddenStates.write_block
    said = {}
    for kind, error in (("refused", OutputError("no space left.")), ("failed", RuntimeError("out of order"))):

        def fail(self: HiddenStates, layer: int, *args: Any, error: Exception = error) -> None:
            if rank == 1 and layer == 2:
                raise error
            write(self, layer, *args)

        HiddenStates.write_block = fail  # type: ignore[method-assign]
        options = ("--cache", "60%", "--calibration", folder / "text.txt", "--tokens", TOKENS, "--device", "cpu")
        result = mla("convert", folder / "source", folder / kind, *options)
        said[kind] = (result.exit_code, result.stderr)
    HiddenStates.write_block = write  # type: ignore[method-assign]
    result = mla("convert", folder / "source", folder / "resumed", "--calibration", folder / "no.txt")
    said["common"] = (result.exit_code, result.stderr)
    result = mla("convert", folder / "source", folder / "refused", *options)
    said["resumed"] = (result.exit_code, result.stderr)
    result = mla("heal", folder / "x", "--teacher", "x", "--data", "x", "--out", folder / "y", "--steps", 1)
    said["healing"] = (result.exit_code, result.stderr)
    (folder / f"said-{rank}.json").write_text(json.dumps(said), encoding="utf-8")


@pytest.mark.long
def test_what_ends_one_process_ends_both_and_is_told_once(prepared: Path) -> None:
    run_in_two(end_in_one, prepared)
    first, second = (json.loads((prepared / f"said-{rank}.json").read_text("utf-8")) for rank in (0, 1))
    for kind, code, fragment in (
        ("refused", 2, "no space left."),
        ("failed", 1, "in process 1, RuntimeError: out of order"),
        ("common", 2, "no.txt does not exist"),
    ):
        assert first[kind][0] == second[kind][0] == code, (first[kind], second[kind])
        assert [line for line in first[kind][1].splitlines() if line.startswith("error:")] != []
        assert fragment in first[kind][1]
        assert second[kind][1] == ""
    assert first["resumed"][0] == second["resumed"][0] == 0, (first["resumed"], second["resumed"])
    assert (prepared / "refused" / "model.safetensors").is_file()
    assert not (prepared / "failed").exists()
    assert first["healing"][0] == second["healing"][0] == 2
    assert "x does not exist" in first["healing"][1]
    assert second["healing"][1] == ""


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_part_is_somebodys(count: int) -> None:
    shares = []
    for rank in range(count):
        processes = Processes()
        processes.rank, processes.count = rank, count
        shares += processes.share(7)
    assert sorted(shares) == list(range(7))
