"""`mla heal`: the attention learns, nothing else changes, and no run makes a model worse."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import save_family
from tiny_source import CONTEXT, convert, write_text
from transformers import TrainerControl, TrainerState
from typer.testing import CliRunner

from conversion.cli import app
from conversion.errors import CalibrationError, ConversionError, JournalError, OutputError, SourceError
from conversion.evaluation.scores import kl_divergence
from conversion.healing import trained_parameters
from conversion.healing.heal import Healed, heal
from conversion.healing.pace import SAVES, Pace
from conversion.healing.recipe import HealingRecipe
from conversion.healing.trainer import DistillationTrainer
from conversion.progress import silent_progress


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
    monkeypatch.setattr(trained_parameters, "RATE", 3.0)
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


def test_training_that_diverges_is_not_published(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_parameters, "RATE", 1e30)
    with pytest.raises(ConversionError, match="diverged within 4 steps, its KL is nan"):
        run(checkpoints, tmp_path / "out", steps=4)
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=[None, 2], ids=["matrices", "adapters"])
def unbroken(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, int | None], dict[str, bytes]]:
    """Settings of a healing, and what it gives."""
    settings, output = {"steps": 24, "lora_rank": request.param}, tmp_path_factory.mktemp("unbroken") / "healed"
    run(checkpoints, output, **settings)
    return settings, contents(output)


@pytest.mark.parametrize("moment", ["before the save", "half-way", "after the save"])
@pytest.mark.parametrize("save", [1, 7, SAVES])
def test_same_bytes_after_an_interruption(
    checkpoints: dict[str, Path], tmp_path: Path, unbroken: tuple[dict, dict[str, bytes]], save: int, moment: str
) -> None:
    settings, expected = unbroken
    original, saves = DistillationTrainer._save_checkpoint, 0

    def stop(self: DistillationTrainer, *args: object) -> None:
        nonlocal saves
        saves += 1
        if saves == save and moment == "before the save":
            raise KeyboardInterrupt
        original(self, *args)
        if saves == save:
            if moment == "half-way":
                Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", "trainer_state.json").write_text("{")
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, tmp_path / "healed", **settings)
    assert [path.name for path in tmp_path.iterdir()] == [".healed.partial"]
    run(checkpoints, tmp_path / "healed", **settings)
    assert contents(tmp_path / "healed") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_what_was_trained_is_not_trained_again(
    checkpoints: dict[str, Path], tmp_path: Path, unbroken: tuple[dict, dict[str, bytes]]
) -> None:
    settings, expected = unbroken

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for moment in ("conversion.healing.heal._write", "conversion.healing.heal._write_report"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moment, stop)
            if moment.endswith("report"):
                patch.setattr("conversion.healing.heal.make_trainer", stop)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoints, tmp_path / "healed", **settings)
    run(checkpoints, tmp_path / "healed", **settings)
    assert contents(tmp_path / "healed") == expected


def test_other_settings_do_not_go_on_from_it(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("conversion.healing.heal._write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, tmp_path / "healed", steps=2)
    for changed in ({"steps": 3}, {"seed": 1}, {"lora_rank": 2}, {"steps": None, "minutes": 1}):
        with pytest.raises(JournalError, match=r"unfinished healing with .*delete the folder"):
            run(checkpoints, tmp_path / "healed", **({"steps": 2} | changed))


def test_the_clock_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("conversion.healing.pace.time.monotonic", lambda: now)
    shown: list[int] = []
    pace = Pace(None, 60.0, shown.append)
    stored = {"Pace": {"args": {}, "attributes": {"seconds": 50.0, "saved": 10}}}
    state = TrainerState(global_step=9, stateful_callbacks=stored)
    assert not pace.is_over(state)
    pace.on_train_begin(None, state, TrainerControl())
    assert (pace.passed(0), sum(shown)) == (50, 50)
    control = pace.on_step_end(None, state, TrainerControl())
    assert (control.should_save, control.should_evaluate, control.should_training_stop) == (False, False, False)
    now += 10
    control = pace.on_step_end(None, state, TrainerControl())
    assert (control.should_save, control.should_evaluate, control.should_training_stop) == (True, True, True)
    state.stateful_callbacks["Pace"] = pace.state()
    assert pace.is_over(state)


def test_disk_that_fills_up_leaves_a_resumable_run(
    checkpoints: dict[str, Path], tmp_path: Path, unbroken: tuple[dict, dict[str, bytes]]
) -> None:
    settings, expected = unbroken
    usage, saved, original = namedtuple("usage", "total used free"), [], torch.save

    def full(*arguments: object, **named: object) -> None:
        saved.append(1)
        if len(saved) > 20:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 32")
        original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.save", full)
        patch.setattr("shutil.disk_usage", lambda _: usage(10, 10, 0))
        with pytest.raises(OutputError, match=r"no space left .*run the same command again"):
            run(checkpoints, tmp_path / "healed", **settings)
    assert [path.name for path in tmp_path.iterdir()] == [".healed.partial"]
    assert list((tmp_path / ".healed.partial" / "training").iterdir())
    run(checkpoints, tmp_path / "healed", **settings)
    assert contents(tmp_path / "healed") == expected


def test_interruption_says_that_heal_goes_on(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.healing.heal.make_trainer", stop)
    command = ["heal", checkpoints["llama_mla"], "--teacher", checkpoints["llama"], "--data", checkpoints["text"]]
    command += ["--steps", 2, "--out", tmp_path / "healed"]
    stopped = CliRunner().invoke(app, [str(argument) for argument in command])
    assert stopped.exit_code == 130
    assert "nothing was published. The same mla heal goes on from there" in stopped.stderr
