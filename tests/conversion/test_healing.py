"""`mla heal`: the attention learns, nothing else changes, and no run makes a model worse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import mla
from healing_runs import LOGITS, prepare, run, small_default
from safetensors.torch import load_file, save_file
from tiny_families import save_family
from tiny_source import CONTEXT, write_text

from conversion.errors import CalibrationError, ConversionError, OutputError, SourceError
from conversion.healing import trained_parameters
from conversion.healing.folder import HealingFolder
from conversion.text.mix import beginnings


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with small_default():
        yield prepare(tmp_path_factory.mktemp("healing"), "llama", "qwen3")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_lowers_the_divergence_and_touches_only_attention(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, lora_rank: int | None
) -> None:
    healed = run(checkpoints, tmp_path / "healed", family, lora_rank=lora_rank, steps=80, stages=LOGITS)
    assert healed.improved
    assert healed.kl_after < 0.98 * healed.kl_before
    before = load_file(checkpoints[f"{family}_mla"] / "model.safetensors")
    after = load_file(tmp_path / "healed" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} >= {"kv_b_proj", "o_proj"}
    assert all(".self_attn." in name and "norm" not in name for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_what_is_reported_is_what_was_saved(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    healed = run(checkpoints, tmp_path / "healed")
    report = json.loads((tmp_path / "healed" / "report.json").read_text())
    assert report["kl_after"] == healed.kl_after
    assert report["recipe"]["teacher"] == "llama"
    assert str(checkpoints["text"].parent) not in json.dumps(report)
    assert "| text.txt |" in (tmp_path / "healed" / "README.md").read_text()
    again = run(checkpoints | {"llama_mla": tmp_path / "healed"}, tmp_path / "again", steps=1)
    assert again.before == pytest.approx(healed.after, rel=1e-5)
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
    monkeypatch.setattr(trained_parameters, "RATE", 0.3)
    healed = run(checkpoints, tmp_path / "healed", steps=10)
    assert not healed.improved
    before = load_file(checkpoints["llama_mla"] / "model.safetensors")
    after = load_file(tmp_path / "healed" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "did not improve" in (tmp_path / "healed" / "README.md").read_text()


def test_stops_after_its_minutes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    healed = run(checkpoints, tmp_path / "healed", minutes=0.05)
    assert 1 <= healed.steps < 10_000


def test_bad_input(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        run(checkpoints, tmp_path)
    with pytest.raises(ConversionError, match="either minutes or steps"):
        run(checkpoints, tmp_path / "out", minutes=1, steps=1)
    with pytest.raises(SourceError, match="is a llama model; give a converted one"):
        run(checkpoints | {"llama_mla": checkpoints["llama"]}, tmp_path / "out")
    other = save_family(tmp_path / "other", "llama", vocab_size=300)
    with pytest.raises(SourceError, match="vocabulary of 300"):
        run(checkpoints | {"llama": other}, tmp_path / "out")
    with pytest.raises(ConversionError, match=r"stages\.0 is .*'nothing'"):
        run(checkpoints, tmp_path / "out", stages=({"stage": "nothing"},))
    with pytest.raises(ConversionError, match="full trains all weights, and lora 2 adapters alone"):
        run(checkpoints, tmp_path / "out", full=True, lora_rank=2)
    short = write_text(tmp_path / "short.txt", length=2 * CONTEXT)
    with pytest.raises(CalibrationError, match=f"too short: of its text 2 windows of {CONTEXT} tokens are for valid"):
        run(checkpoints | {"text": short}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "short.txt"]


def test_text_that_the_teacher_writes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """It is one more domain, begins as the others' windows do, and is written once."""
    data = [f"{checkpoints['text']}:0.5", "self:0.5"]
    healed = run(checkpoints, tmp_path / "healed", data=data, steps=16)
    assert list(healed.before)[-1] == "self-written"
    assert len(healed.before) == 4
    written: list[torch.Tensor] = []
    begun: list[torch.Tensor] = []

    def keep(self: HealingFolder, windows: torch.Tensor) -> None:
        written.append(windows)
        raise KeyboardInterrupt

    def noted(*arguments: object) -> torch.Tensor:
        begun.append(beginnings(*arguments))
        return begun[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealingFolder, "write_text", keep)
        patch.setattr("conversion.healing.train.beginnings", noted)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, tmp_path / "again", data=data, steps=16)
    assert written[0].shape == begun[0].shape == (18, CONTEXT)
    assert torch.equal(written[0][:, :32], begun[0][:, :32])
    assert (written[0][:, 32:] != begun[0][:, 32:]).float().mean() > 0.5


def test_command_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """It needs no more than a teacher and a time, or a number of steps."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["llama_mla"], model)
    command = ["heal", model, "--teacher", checkpoints["llama"]]
    refused = mla(*command)
    assert refused.exit_code == 2
    assert "error: give either minutes or steps" in refused.stderr
    made = mla(*command, "--steps", "12")
    assert made.exit_code == 0, made.output
    assert "validation KL" in made.stdout
    assert f"{tmp_path}/model-healed/report.html shows what was found." in made.stdout
    report = json.loads((tmp_path / "model-healed" / "report.json").read_text())
    assert [stage["stage"] for stage in report["recipe"]["stages"]] == ["layers", "logits", "long"]
    assert list(report["before"]) == ["prose", "code"]
    assert (tmp_path / "model-healed" / "healing.png").read_bytes().startswith(b"\x89PNG")


def test_recipe_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "heal.yaml"
    file.write_text(
        f"""
model: elsewhere
teacher: elsewhere
output: {tmp_path / "healed"}
seed: 3
steps: 6
data: ["{checkpoints["text"]}:0.7", "default:0.3"]
stages:
  - {{stage: layers, share: 1, window: 32, batch: 1}}
  - {{stage: logits, share: 2, window: 32, batch: 2, temperature: 2.0, cross_entropy: 0.1}}
"""
    )
    made = mla("heal", checkpoints["llama_mla"], "--teacher", checkpoints["llama"], "--recipe", file)
    assert made.exit_code == 0, made.output
    report = json.loads((tmp_path / "healed" / "report.json").read_text())
    assert report["recipe"]["data"] == ["text.txt:0.7", "default:0.3"]
    assert (report["recipe"]["seed"], report["steps"], report["tokens"]) == (3, 6, 2 * 32 + 4 * 2 * 32)
    file.write_text("stages: [{stage: layers, share: 0}]")
    refused = mla("heal", "x", "--teacher", "x", "--steps", 1, "--recipe", file)
    assert refused.exit_code == 2
    assert "stages.0.layers.share is 0" in refused.stderr


def damaged_copy(folder: Path, output: Path, name: str, change: Callable[[torch.Tensor], object]) -> Path:
    """A checkpoint with one other tensor."""
    shutil.copytree(folder, output)
    tensors = load_file(output / "model.safetensors")
    change(tensors[name])
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_teacher_that_the_model_was_not_made_from_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    foreign = damaged_copy(
        checkpoints["llama"], tmp_path / "foreign", name, lambda tensor: tensor.flatten()[:1].mul_(2)
    )
    with pytest.raises(SourceError, match=f"{name} of .*foreign is not that of .*the model that it was made from"):
        run(checkpoints | {"llama": foreign}, tmp_path / "out", steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_teacher_that_gives_no_numbers_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    broken = damaged_copy(checkpoints["llama"], tmp_path / "broken", name, lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(SourceError, match="broken gives logits that are not finite"):
        run(checkpoints | {"llama": broken}, tmp_path / "out", steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
