"""`mla heal`: the attention learns, nothing else changes, and no run makes a model worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import save_family
from tiny_source import CONTEXT, convert, write_text
from typer.testing import CliRunner

from conversion import healing
from conversion.cli import app
from conversion.errors import CalibrationError, ConversionError, OutputError, SourceError
from conversion.healing import Healed, HealingRecipe, heal
from conversion.progress import silent_progress
from conversion.scores import kl_divergence


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source and a compressed form that leaves much to heal, in bfloat16, and a text for both."""
    folder = tmp_path_factory.mktemp("healing")
    text = write_text(folder / "text.txt", length=4000)
    made = {"text": text}
    for family in ("llama", "qwen3"):
        source = save_family(folder / family, family, dtype=torch.bfloat16)
        made[family] = source
        made[f"{family}_mla"] = convert(
            source, folder / f"{family}_mla", method="transmla", cache="50%", calibration=str(text), tokens=1024
        ).output
    return made


def run(checkpoints: dict[str, Path], output: Path, family: str = "llama", **settings) -> Healed:
    recipe = {"model": checkpoints[f"{family}_mla"], "teacher": checkpoints[family], "data": checkpoints["text"]}
    recipe = {name: str(path) for name, path in recipe.items()} | {"steps": 40} | settings
    return heal(HealingRecipe(output=output, **recipe), silent_progress())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_lowers_the_divergence_and_touches_only_attention(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, lora_rank: int | None
) -> None:
    healed = run(checkpoints, tmp_path / "healed", family, lora_rank=lora_rank, steps=100)
    assert healed.improved
    assert healed.kl_after < 0.97 * healed.kl_before
    before = load_file(checkpoints[f"{family}_mla"] / "model.safetensors")
    after = load_file(tmp_path / "healed" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} >= {"kv_b_proj", "o_proj"}
    assert all(".self_attn." in name and "norm" not in name for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_what_is_reported_is_what_was_saved(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    healed = run(checkpoints, tmp_path / "healed")
    report = json.loads((tmp_path / "healed" / "healing.json").read_text())
    assert report["kl_after"] == healed.kl_after
    assert report["recipe"]["teacher"] == "llama"
    assert str(checkpoints["text"].parent) not in json.dumps(report)
    assert "Validation KL" in (tmp_path / "healed" / "README.md").read_text()
    again = run(checkpoints | {"llama_mla": tmp_path / "healed"}, tmp_path / "again", steps=1)
    assert again.kl_before == pytest.approx(healed.kl_after, rel=1e-5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again", "healed"]


def test_same_seed_same_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(checkpoints, tmp_path / name, seed=seed, steps=10)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_unimproved_run_keeps_the_input(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "RATE", 3.0)
    healed = run(checkpoints, tmp_path / "healed", steps=10)
    assert not healed.improved
    before = load_file(checkpoints["llama_mla"] / "model.safetensors")
    after = load_file(tmp_path / "healed" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "did not improve" in (tmp_path / "healed" / "README.md").read_text()


def test_stops_after_its_minutes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    healed = run(checkpoints, tmp_path / "healed", steps=None, minutes=0.05)
    assert 1 <= healed.steps < 1000


def test_divergence_is_the_definition() -> None:
    teacher, student = torch.randn(2, 2, 3, 5, dtype=torch.float64).unbind(0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert kl_divergence(teacher, student).item() == pytest.approx(expected.item(), rel=1e-5)


def test_bad_input(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        run(checkpoints, tmp_path)
    with pytest.raises(ConversionError, match="either minutes or steps"):
        run(checkpoints, tmp_path / "out", minutes=1)
    with pytest.raises(SourceError, match="is a llama model; give a converted one"):
        run(checkpoints | {"llama_mla": checkpoints["llama"]}, tmp_path / "out")
    other = save_family(tmp_path / "other", "llama", vocab_size=300)
    with pytest.raises(SourceError, match="vocabulary of 300"):
        run(checkpoints | {"llama": other}, tmp_path / "out")
    short = write_text(tmp_path / "short.txt", length=5 * CONTEXT)
    with pytest.raises(CalibrationError, match=f"has . windows of {CONTEXT} tokens; 8 are for validation"):
        run(checkpoints | {"text": short}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "short.txt"]


def test_command_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    command = ["heal", checkpoints["llama_mla"], "--teacher", checkpoints["llama"], "--data", checkpoints["text"]]
    command = [str(argument) for argument in (*command, "--out", tmp_path / "healed")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "error: give either minutes or steps" in refused.stderr
    made = CliRunner().invoke(app, [*command, "--steps", "20"])
    assert made.exit_code == 0, made.output
    assert "validation KL" in made.stdout
    assert "is ready" in made.stdout
    assert (tmp_path / "healed" / "healing.json").is_file()


def test_interruption_leaves_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(healing, "_round_as_stored", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints, tmp_path / "healed", steps=1)
    assert list(tmp_path.iterdir()) == []
