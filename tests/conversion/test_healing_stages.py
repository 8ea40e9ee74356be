"""What the stages of a healing minimise, by its definition, and when they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from healing_runs import prepare, run, small_default
from torch import nn

from conversion.checkpoint.location import locate
from conversion.errors import CalibrationError
from conversion.healing import train, trained_parameters
from conversion.healing.pair import Pair, attention_names, load_pair
from conversion.healing.stages import DEFAULT_STAGES, Layers, Logits, Long, Stage
from conversion.healing.stages.layers import block_of
from conversion.healing.stages.logits import divergence
from conversion.healing.trained_parameters import trainable_names, unfrozen
from conversion.sources import open_source

FAMILIES = ("llama", "gemma2", "gpt_neox")
"""A plain one; one with norms behind the attention; one whose attention and MLP lie side by side."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with small_default():
        yield prepare(tmp_path_factory.mktemp("stages"), *FAMILIES)


def opened(checkpoints: dict[str, Path], family: str) -> tuple[Pair, dict[str, nn.Parameter]]:
    location = locate(str(checkpoints[f"{family}_mla"]))
    pair = load_pair(location, open_source(str(checkpoints[family])), ())
    return pair, unfrozen(pair.student, trainable_names(pair.student))[0]


def test_what_both_models_have_in_common_is_there_once(checkpoints: dict[str, Path]) -> None:
    """What is learnt is not: the conversion has left ``o_proj`` as it was, and the teacher must not learn."""
    pair, trained = opened(checkpoints, "llama")
    teacher, student = (dict(model.named_parameters()) for model in (pair.teacher, pair.student))
    shared = {name for name in teacher if teacher[name] is student.get(name)}
    assert shared == {name for name in teacher if ".self_attn." not in name}
    unchanged = {name for name in teacher.keys() & trained.keys() if torch.equal(teacher[name], trained[name])}
    assert any("o_proj" in name for name in unchanged)


def learnt(stage: Stage, pair: Pair, ids: torch.Tensor) -> list[float]:
    """The terms of a stage's loss, each of which gives its gradients."""
    terms: list[float] = []

    def each(term: torch.Tensor) -> None:
        term.backward()
        terms.append(float(term.detach()))

    stage.losses(pair, ids, each)
    return terms


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_the_definition(temperature: float) -> None:
    teacher, student = torch.randn(2, 2, 70, 5, dtype=torch.float64).unbind(0)
    student.requires_grad_(True)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    (gradient,) = torch.autograd.grad(3 * expected, student)
    found = divergence(teacher, student, temperature)
    (found_gradient,) = torch.autograd.grad(3 * found, student)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-7)


def test_cross_entropy_is_that_of_the_next_token(checkpoints: dict[str, Path]) -> None:
    pair, _ = opened(checkpoints, "llama")
    ids = torch.randint(2, 250, (2, 20))
    (plain,), (both,) = (learnt(Logits(cross_entropy=weight), pair, ids) for weight in (0.0, 0.5))
    with torch.no_grad():
        expected = pair.student(ids, labels=ids, use_cache=False).loss
    assert both - plain == pytest.approx(0.5 * float(expected), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_learns_alone_on_the_teachers_states(checkpoints: dict[str, Path], family: str) -> None:
    """Its loss is that of the block by itself, whatever the blocks before it do."""
    pair, trained = opened(checkpoints, family)
    ids = torch.randint(2, 250, (2, 20))
    names = attention_names(pair.student)
    with torch.no_grad():
        states = pair.teacher.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states
    terms = learnt(Layers(), pair, ids)
    assert len(terms) == len(names) == 3
    gradients = {name: weight.grad.clone() for name, weight in trained.items()}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        for name, weight in trained.items():
            if name.startswith(names[0]):
                weight.mul_(1.5)
    pair.student.zero_grad()
    others = learnt(Layers(), pair, ids)
    assert others[0] != pytest.approx(terms[0], rel=1e-3)
    assert others[1:] == pytest.approx(terms[1:], rel=1e-6)
    for name, weight in trained.items():
        if not name.startswith(names[0]):
            torch.testing.assert_close(weight.grad, gradients[name])
    # By hand, of the second block: what enters it and what leaves it in the teacher.
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, __, out: seen.update({name: out[0] if isinstance(out, tuple) else out}))

    calls: dict[str, tuple] = {}
    for who, model in (("teacher", pair.teacher), ("student", pair.student)):
        block = block_of(model, names[1])
        keep(f"{who} attention", model.get_submodule(names[1]))
        block.register_forward_pre_hook(lambda _, args, kw, who=who: calls.update({who: (args, kw)}), with_kwargs=True)
        with torch.no_grad():
            model.base_model(ids, use_cache=False)
            args, kwargs = calls[who]
            left = block(states[1], *args[1:], **{name: kwargs[name] for name in kwargs if name != "hidden_states"})
            seen[f"{who} stream"] = left[0] if isinstance(left, tuple) else left
    energy = seen["teacher stream"].square().sum(-1)
    expected = sum(
        ((seen[f"student {what}"] - seen[f"teacher {what}"]).square().sum(-1) / energy).mean()
        for what in ("attention", "stream")
    )
    assert terms[1] == pytest.approx(float(expected), rel=1e-4)


def test_layers_lower_their_own_loss_and_the_divergence(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    stages = ({"stage": "layers", "window": 64},)
    healed = run(checkpoints, tmp_path / "healed", stages=stages, steps=80)
    losses = [look.held_out for look in healed.looks]
    assert losses[-1] < 0.97 * losses[0]
    assert healed.improved


def test_layers_end_where_held_out_text_gains_no_more(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """What they leave goes to the stage behind."""
    assert not Layers().is_done([1.0])
    assert not Layers().is_done([1.0, 0.5])
    assert Layers().is_done([1.0, 0.5, 0.4999])
    assert not Logits().is_done([1.0, 1.0])
    stages = ({"stage": "layers", "window": 64, "rate": 1e-6, "share": 0.9}, {"stage": "logits", "window": 64})
    healed = run(checkpoints, tmp_path / "healed", stages=stages, steps=48)
    last = {look.stage: look.step for look in healed.looks}
    assert last == {"layers": 8, "logits": 48}


def test_time_is_shared_by_the_stages(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    stages = tuple({"stage": "logits", "window": 32, "share": share} for share in (1, 3, 2))
    healed = run(checkpoints, tmp_path / "healed", stages=stages, steps=24)
    assert {look.step for look in healed.looks} >= {4, 16, 24}
    assert healed.tokens == 24 * DEFAULT_STAGES[1].batch * 32


def test_rates_go_with_the_root_of_the_divergence(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained_parameters.pace(4 * 0.1) == pytest.approx(2 * trained_parameters.pace(0.1))
    assert trained_parameters.pace(100.0) == 2.5
    assert trained_parameters.pace(-1e-9) == 0
    asked: list[float] = []
    monkeypatch.setattr(train, "pace", lambda kl: asked.append(kl) or 0.0)
    healed = run(checkpoints, tmp_path / "healed", steps=2)
    assert asked == [healed.kl_before]
    assert not healed.improved, "at a rate of zero nothing is learnt"


def test_the_default_is_all_three() -> None:
    assert [type(stage) for stage in DEFAULT_STAGES] == [Layers, Logits, Long]
    assert DEFAULT_STAGES[-1].window == 4096


def test_window_that_no_text_has_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a key and a value\n" * 10)
    with pytest.raises(CalibrationError, match="no text is as long as a window of stage logits, 64 tokens"):
        run(checkpoints | {"text": short}, tmp_path / "out", stages=({"stage": "logits"},), data=[f"{short}"], steps=1)
