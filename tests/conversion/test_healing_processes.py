"""Two processes that heal together learn from different windows, and from the same ones as one process with batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from healing_runs import STAGES, prepare, run, small_default
from safetensors.torch import load_file
from two_processes import run_in_two

STEPS = 12


def in_batches(count: int) -> tuple:
    return tuple(stage | {"batch": count} for stage in STAGES)


def heal_together(folder: Path) -> None:
    checkpoints = {name: folder / name for name in ("llama", "llama_mla")} | {"text": folder / "text.txt"}
    with small_default():
        run(checkpoints, folder / "together", steps=STEPS, stages=in_batches(1))


def test_the_result_is_that_of_one_process_with_batches_of_two(tmp_path: Path) -> None:
    with small_default():
        checkpoints = prepare(tmp_path, "llama")
        run_in_two(heal_together, tmp_path)
        alone = run(checkpoints, tmp_path / "alone", steps=STEPS, stages=in_batches(2))
    report = json.loads((tmp_path / "together" / "report.json").read_text())
    assert report["tokens"] == alone.tokens
    assert report["after"] == pytest.approx(alone.after, rel=1e-3)
    assert [look["loss"] for look in report["looks"]] == pytest.approx([look.loss for look in alone.looks], rel=1e-3)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("together", "alone"))
    for name, tensor in expected.items():
        assert (found[name].float() - tensor.float()).abs().max() <= 0.02 * tensor.float().abs().max(), name
    assert not torch.equal(
        expected["model.layers.0.self_attn.o_proj.weight"],
        load_file(checkpoints["llama_mla"] / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"],
    )
