"""Two processes share the text of a sweep, and come to what one comes to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_source import save_source, write_text
from two_processes import run_in_two

from conversion.sources import open_source
from conversion.sweep import job
from conversion.sweep.recipe import make_sweep
from conversion.sweep.result import SweepResult
from conversion.sweep.sweep import run_sweep


def sweep_into(folder: Path, output: str) -> SweepResult:
    job.CONTEXTS = (64,)
    options = {"calibration": str(folder / "text.txt"), "tokens": 640, "latent_bits": 16}
    recipe = make_sweep(str(folder / "source"), folder / output, "50%", figures_only=False, **options)
    source = open_source(str(folder / "source"))
    return run_sweep(recipe, recipe.plans(source), source)


def sweep_together(folder: Path) -> None:
    assert sweep_into(folder, "shared").sizes[0].folder == "50%"


@pytest.mark.long
def test_the_figures_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CONTEXTS", job.CONTEXTS)
    save_source(tmp_path / "source", torch.float32)
    write_text(tmp_path / "text.txt")
    run_in_two(sweep_together, tmp_path)
    shared = SweepResult.model_validate_json((tmp_path / "shared" / "report.json").read_text())
    alone = sweep_into(tmp_path, "alone")
    rows = ([*result.sizes, *result.quantised_source] for result in (shared, alone))
    for found, expected in zip(*rows, strict=True):
        assert found.kl == pytest.approx(expected.kl, rel=1e-4)
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert not [path for path in (tmp_path / "shared").iterdir() if path.name.startswith(".")]
