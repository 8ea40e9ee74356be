"""A method that measures twice: what its second pass sees, where that is kept, and what it is used for again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import naive_attention as naive
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, save_family
from tiny_source import LAYERS, byte_tokenizer, convert, save_source, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from conversion.layers import LayerBudget, encoder_input
from conversion.methods import get_method
from conversion.methods.base import TwoPassMethod
from conversion.methods.transmla import TransMLAMethod
from conversion.pipeline.work.journal import WorkFolder
from conversion.pipeline.work.measurements import SharedMeasurements
from conversion.planning.text_use import window_length
from conversion.sources import open_source
from conversion.text.windows import load_windows

RECIPE = {"method": "transmla", "cache": "50%", "tokens": 256}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def moments(folder: Path) -> list[Tensor]:
    return [load_file(folder / f"statistics-{layer:05d}.safetensors")["moment"] for layer in range(LAYERS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_the_model_that_lost_its_rotations(family: str, tmp_path: Path) -> None:
    folder, text = save_family(tmp_path / "source", family, dtype=torch.float32), write_text(tmp_path / "text.txt")
    recipe = {"method": "transmla", "calibration": str(text), "tokens": 256, "statistics": tmp_path / "statistics"}
    # At its largest size the converted model has lost nothing but rotations.
    intermediate = convert(folder, tmp_path / "intermediate", cache="100%", **recipe).output
    (second,) = (tmp_path / "statistics").glob("intermediate-*")

    source = open_source(str(folder))
    windows = load_windows(str(text), byte_tokenizer(), window_length(source), 256, seed=0)
    model = AutoModelForCausalLM.from_pretrained(intermediate, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
        for layer, (first, found) in enumerate(zip(moments(second.parent), moments(second), strict=True)):
            inputs = source.attention_input(source.decoder_layer(layer), states[layer])
            seen = encoder_input(inputs, source.attention(layer).k).flatten(0, 1).double()
            seen = torch.nn.functional.pad(seen, (0, 1), value=1.0)
            torch.testing.assert_close(found, seen.T @ seen, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
            assert ((found - first).norm() > 1e-2 * first.norm()) == (layer > 0)


def test_the_latent_follows_the_second_pass_and_the_rotary_key_the_first() -> None:
    method = get_method("transmla")
    assert isinstance(method, TwoPassMethod)
    geometry, weights = naive.random_layer()
    draw = torch.Generator().manual_seed(5)
    data = torch.randn(3, 50, geometry.hidden_size + 1, generator=draw, dtype=torch.float64)
    first, second, other = (window.T @ window for window in data)

    def cached(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        converted = method.factorise(geometry, weights, {"moment": first}, LayerBudget(6, 8), {"moment": second})
        latent, rotary = converted.kv_a_proj_with_mqa.split((6, 8))
        return latent, rotary

    latent, rotary = cached(first, second)
    assert torch.equal(cached(first, other)[1], rotary)
    assert not torch.allclose(cached(first, other)[0], latent)
    assert not torch.allclose(cached(other, second)[1], rotary)


def test_the_intermediate_layer_is_the_method_at_full_rank() -> None:
    method = get_method("transmla")
    assert isinstance(method, TwoPassMethod)
    geometry, weights = naive.random_layer(biases=True)
    inputs = torch.randn(9, geometry.hidden_size, dtype=torch.float64)
    augmented = torch.nn.functional.pad(inputs, (0, 1), value=1.0)
    statistics = {"moment": augmented.T @ augmented}
    for width in (8, 4):
        intermediate = method.intermediate(geometry, weights, statistics, width)
        budget = LayerBudget(geometry.cache_elements - width, width)
        second = {"moment": torch.eye(geometry.hidden_size + 1)}
        converted = method.factorise(geometry, weights, statistics, budget, second)
        found, expected = (naive.converted_output(geometry, layer, inputs) for layer in (intermediate, converted))
        torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``source``, ``text.txt``, ``direct`` (50%, measured for itself), and ``statistics`` of a 75% conversion."""
    folder = tmp_path_factory.mktemp("second-pass")
    save_source(folder / "source")
    recipe = RECIPE | {"calibration": str(write_text(folder / "text.txt"))}
    convert(folder / "source", folder / "direct", **recipe)
    convert(folder / "source", folder / "first", **(recipe | {"cache": "75%", "statistics": folder / "statistics"}))
    return folder


def stop_at(step: int, *, before: bool) -> Callable[[SharedMeasurements, int], None]:
    """An ``advance`` that is interrupted at its ``step``-th call, before or after it has written the journal."""
    original, calls = SharedMeasurements.advance, 0

    def advance(self: SharedMeasurements, measured: int) -> None:
        nonlocal calls
        calls += 1
        if calls == step and before:
            raise KeyboardInterrupt
        original(self, measured)
        if calls == step:
            raise KeyboardInterrupt

    return advance


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("step", range(1, LAYERS + 2))
def test_same_bytes_after_an_interruption(step: int, before: bool, folder: Path, tmp_path: Path) -> None:
    recipe = RECIPE | {"calibration": str(folder / "text.txt")}
    with pytest.MonkeyPatch.context() as patch:
        # The first pass of a conversion without a folder for statistics has another journal.
        patch.setattr(SharedMeasurements, "advance", stop_at(step, before=before))
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "source", tmp_path / "out", **recipe)
    assert contents(convert(folder / "source", tmp_path / "out", **recipe).output) == contents(folder / "direct")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_same_bytes_after_an_interruption_between_conversions(folder: Path, tmp_path: Path) -> None:
    recipe = RECIPE | {"calibration": str(folder / "text.txt")}
    original = WorkFolder.save

    def stop_after_the_first_layer(self: WorkFolder) -> None:
        original(self)
        if self.journal.converted == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save", stop_after_the_first_layer)
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "source", tmp_path / "out", **recipe)
    with pytest.MonkeyPatch.context() as patch:
        measured = counted(patch)
        assert contents(convert(folder / "source", tmp_path / "out", **recipe).output) == contents(folder / "direct")
    assert measured == []


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every layer that is measured."""
    original, layers = TransMLAMethod.statistics, []

    def statistics(self: TransMLAMethod, geometry: object, weights: object, seed: int) -> object:
        layers.append(seed)
        return original(self, geometry, weights, seed)

    patch.setattr(TransMLAMethod, "statistics", statistics)
    return layers


def test_another_rank_is_not_measured_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = counted(monkeypatch)
    recipe = RECIPE | {"calibration": str(folder / "text.txt"), "statistics": folder / "statistics"}
    output = convert(folder / "source", tmp_path / "out", **recipe).output
    assert measured == []
    assert contents(output) == contents(folder / "direct")


def test_another_rotary_key_measures_its_own_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE | {"calibration": str(folder / "text.txt"), "cache": "25%"}
    expected = contents(convert(folder / "source", tmp_path / "direct", **recipe).output)
    measured = counted(monkeypatch)
    for name in ("out", "again"):
        recipe["statistics"] = folder / "statistics"
        assert contents(convert(folder / "source", tmp_path / name, **recipe).output) == expected
        assert measured == list(range(LAYERS))
    kept = {path.name: path for path in (folder / "statistics").glob("intermediate-*")}
    assert sorted(kept) == ["intermediate-16", "intermediate-8"]
    for path in kept.values():
        # Hidden states are of use to this pass alone.
        assert sorted(contents(path)) == [
            "measurements.json", *(f"statistics-{layer:05d}.safetensors" for layer in range(LAYERS)),
        ]  # fmt: skip
