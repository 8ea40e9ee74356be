"""Healing of more than attention: all weights, and the last matrix of every MLP in closed form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from healing_runs import LOGITS, prepare, run, small_default
from safetensors.torch import load_file
from torch import nn

from conversion.checkpoint.location import locate
from conversion.errors import ConversionError
from conversion.healing.mlp_ridge import RIDGE, mlp_out_names, solve_mlp_out
from conversion.healing.pair import Pair, load_pair
from conversion.sources import open_source

MLP_OUT = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with small_default():
        made = prepare(tmp_path_factory.mktemp("weights"), "llama", "granitemoe")
        yield made


def changed(checkpoints: dict[str, Path], output: Path, family: str = "llama") -> set[str]:
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoints[f"{family}_mla"], output))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_full_trains_all_weights_and_says_so(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    healed = run(checkpoints, tmp_path / "healed", full=True, stages=LOGITS)
    assert healed.improved
    names = changed(checkpoints, tmp_path / "healed")
    assert {"model.embed_tokens.weight", "lm_head.weight", MLP_OUT.format(1), "model.norm.weight"} <= names
    assert "All weights distilled" in (tmp_path / "healed" / "README.md").read_text()
    assert json.loads((tmp_path / "healed" / "report.json").read_text())["recipe"]["full"] is True
    attention = run(checkpoints, tmp_path / "attention", stages=LOGITS)
    assert attention.trained_parameters < healed.trained_parameters
    assert all(".self_attn." in name for name in changed(checkpoints, tmp_path / "attention"))


def test_full_is_refused_where_experts_are_stored_one_by_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    stored = set(load_file(checkpoints["granitemoe_mla"] / "model.safetensors"))
    held = {name for name, _ in opened(checkpoints, "granitemoe", ()).student.named_parameters()}
    if held <= stored:
        assert run(checkpoints, tmp_path / "healed", "granitemoe", full=True, stages=LOGITS, steps=2).steps == 2
    else:
        with pytest.raises(ConversionError, match="is stored in several parts, which full cannot write"):
            run(checkpoints, tmp_path / "healed", "granitemoe", full=True, stages=LOGITS, steps=2)


def opened(checkpoints: dict[str, Path], family: str, own: tuple[str, ...]) -> Pair:
    return load_pair(locate(str(checkpoints[f"{family}_mla"])), open_source(str(checkpoints[family])), own)


def streams(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Hidden states behind every block, the last one before the final norm."""
    left: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: left.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return tuple(left)


def test_solved_matrices_bring_every_stream_closest_to_the_teachers(checkpoints: dict[str, Path]) -> None:
    """Of the first block it is the ridge solution; behind each the error is smaller than before."""
    names = [MLP_OUT.format(layer) for layer in range(3)]
    pair, steps = opened(checkpoints, "llama", tuple(names)), []
    windows = torch.randint(2, 250, (6, 40))
    wanted = streams(pair.teacher, windows)
    before = [
        (found - target).square().sum() for found, target in zip(streams(pair.student, windows), wanted, strict=True)
    ]
    own = pair.student.get_parameter(names[0]).double().clone()
    read: list[torch.Tensor] = []
    hook = pair.student.get_submodule("model.layers.0.mlp.down_proj").register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].flatten(0, 1).double())
    )
    missing = (wanted[0] - streams(pair.student, windows)[0]).flatten(0, 1).double()
    hook.remove()
    gram = read[0].mT @ read[0]
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    expected = own + torch.linalg.solve(gram, read[0].mT @ missing).mT
    kept = {name: weight.clone() for name, weight in pair.teacher.named_parameters()}
    solve_mlp_out(pair, names, windows, lambda: steps.append(1))
    torch.testing.assert_close(pair.student.get_parameter(names[0]).double(), expected, rtol=1e-3, atol=1e-4)
    after = [
        (found - target).square().sum() for found, target in zip(streams(pair.student, windows), wanted, strict=True)
    ]
    assert all(new < 0.97 * old for new, old in zip(after, before, strict=True))
    assert len(steps) == 3
    assert all(torch.equal(weight, kept[name]) for name, weight in pair.teacher.named_parameters())


def test_also_mlp_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plain = run(checkpoints, tmp_path / "plain", stages=LOGITS, steps=6)
    healed = run(checkpoints, tmp_path / "healed", stages=LOGITS, steps=6, also=("mlp-out",))
    assert healed.before == pytest.approx(plain.before)
    assert healed.kl_after < plain.kl_after
    names = changed(checkpoints, tmp_path / "healed")
    assert {MLP_OUT.format(layer) for layer in range(3)} <= names
    assert {name.split(".")[3] for name in names} == {"self_attn", "mlp"}


def test_mlp_out_that_does_harm_is_taken_back(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(pair: Pair, names: list[str], *_: object) -> None:
        for name in names:
            pair.student.get_parameter(name).mul_(3)

    monkeypatch.setattr("conversion.healing.train.solve_mlp_out", torch.no_grad()(spoil))
    assert run(checkpoints, tmp_path / "healed", stages=LOGITS, also=("mlp-out",)).improved
    assert not any(".mlp." in name for name in changed(checkpoints, tmp_path / "healed"))


def test_mlp_out_of_experts_is_refused() -> None:
    assert mlp_out_names([MLP_OUT.format(0), "model.layers.0.mlp.up_proj.weight"], "x") == [MLP_OUT.format(0)]
    with pytest.raises(ConversionError, match="x has no dense down_proj that mlp-out could solve"):
        mlp_out_names(["model.layers.0.block_sparse_moe.output_linear.weight"], "x")
