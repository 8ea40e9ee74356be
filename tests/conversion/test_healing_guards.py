"""What a healing saves is better in the mean and in no domain worse; faults that are put in change nothing of that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from healing_runs import LOGITS, prepare, run, small_default
from safetensors.torch import load_file

from conversion.errors import ConversionError
from conversion.healing.stages import Logits
from conversion.healing.validation import Validation, has_diverged, risen


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with small_default():
        yield prepare(tmp_path_factory.mktemp("guards"), "llama")


def same_weights(*folders: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    return all(torch.equal(first[name], second[name]) for name in first)


def poisoned(step: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From that step on the loss is multiplied by ``value``."""
    original, calls = Logits.losses, 0

    def losses(self: Logits, pair, ids, each) -> None:
        nonlocal calls
        calls += torch.is_grad_enabled()
        original(self, pair, ids, lambda term: each(term * value if calls > step * self.batch else term))

    monkeypatch.setattr(Logits, "losses", losses)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_no_number_ends_with_the_last_good_weights(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poisoned(30, value, monkeypatch)
    healed = run(checkpoints, tmp_path / "healed", stages=LOGITS)
    assert healed.improved
    assert "diverged at step 31" in str(healed.note)
    assert healed.steps == 31
    weights = load_file(tmp_path / "healed" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    report = json.loads((tmp_path / "healed" / "report.json").read_text())
    assert "diverged at step 31" in report["note"]
    assert healed.kl_after == pytest.approx(min(sum(look.kl.values()) / 3 for look in healed.looks), rel=0.01)


def test_divergence_before_anything_was_better_publishes_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(1, float("nan"), monkeypatch)
    with pytest.raises(ConversionError, match="diverged at step 2, its loss is nan, before anything was better"):
        run(checkpoints, tmp_path / "healed", stages=LOGITS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("factor", "looks"), [(4.0, 4), (float("nan"), 3)])
def test_weights_that_run_away_end_a_healing(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, looks: int
) -> None:
    original, measured = Validation.standing, 0

    def standing(self: Validation) -> dict[str, float]:
        nonlocal measured
        measured += 1
        return {name: kl * (factor if measured == fault else 1) for name, kl in original(self).items()}

    monkeypatch.setattr(Validation, "standing", standing)
    fault = 2
    with pytest.raises(ConversionError, match=r"diverged by step 2, its KL is .* before anything was better"):
        run(checkpoints, tmp_path / "healed", stages=LOGITS, steps=24)
    assert list(tmp_path.iterdir()) == []
    measured, fault = 0, 5
    healed = run(checkpoints, tmp_path / "healed", stages=LOGITS, steps=24)
    assert healed.improved
    assert (healed.steps, len(healed.looks)) == (8, looks)
    assert "diverged by step 8" in str(healed.note)


def test_a_domain_that_gets_worse_keeps_a_state_from_being_saved(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others get better, and the mean as well."""
    original, measured = Validation.standing, 0

    def standing(self: Validation) -> dict[str, float]:
        nonlocal measured
        measured += 1
        found = dict(original(self))
        return found | {"code": found["code"] * (1 if measured == 1 else 1.1)}

    monkeypatch.setattr(Validation, "standing", standing)
    healed = run(checkpoints, tmp_path / "healed", stages=LOGITS)
    assert not healed.improved
    assert healed.after == healed.before
    assert "nothing came closer" in str(healed.note) or "code would end farther" in str(healed.note)
    assert same_weights(tmp_path / "healed", checkpoints["llama_mla"])
    assert "did not improve" in (tmp_path / "healed" / "README.md").read_text()


def test_the_best_state_is_saved_and_not_the_last(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the 13th step on the gradient has the wrong sign."""
    poisoned(12, -1.0, monkeypatch)
    healed = run(checkpoints, tmp_path / "healed", stages=LOGITS)
    means = [sum(look.kl.values()) / len(look.kl) for look in healed.looks]
    assert means[-1] > 1.005 * min(means)
    assert healed.kl_after == pytest.approx(min(means), rel=0.01), "up to the rounding of what is stored"


def test_a_stage_that_does_harm_is_undone(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(0, -1.0, monkeypatch)
    stages = ({"stage": "logits", "window": 64, "rate": 0.2}, {"stage": "layers", "window": 64})
    healed = run(checkpoints, tmp_path / "healed", stages=stages, steps=30)
    first = [look for look in healed.looks if look.stage == "logits"]
    assert sum(first[-2].kl.values()) > sum(healed.before.values())
    assert first[-1].kl == healed.before, "what follows begins where the healing began"


def test_limits() -> None:
    assert risen({"a": 0.1, "b": 0.1}, {"a": 0.1019, "b": 0.01}) == []
    assert risen({"a": 0.1, "b": 0.1}, {"a": 0.1021, "b": 0.01}) == ["a"]
    assert risen({"a": 0.1, "b": 1e-7}, {"a": float("nan"), "b": 9e-5}) == ["a"]
    assert has_diverged({"a": 0.1}, {"a": 0.31})
    assert has_diverged({"a": 0.1}, {"a": float("nan")})
    assert not has_diverged({"a": 0.1}, {"a": 0.29})
