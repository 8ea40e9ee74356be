"""Verification in pieces finds what whole models show, and holds one layer at a time."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_families import FAMILIES, save_family
from tiny_source import CONTEXT, LAYERS, convert, save_source
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conversion.checkpoint.model_reader import as_held
from conversion.checkpoint.reader import SafetensorsReader
from conversion.evaluation import compare, whole_model
from conversion.evaluation.verify import verify_checkpoint
from conversion.forward.streamed_model import StreamedModel
from conversion.progress import silent_progress
from conversion.reporting.report import verification_tables
from conversion.sources import open_source


def windows(count: int = 3) -> torch.Tensor:
    return torch.randint(2, 258, (count, CONTEXT), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def streamed_logits(model: StreamedModel, ids: torch.Tensor) -> torch.Tensor:
    states = model.enter(ids)
    for layer in range(LAYERS):
        with model.layer(layer) as run:
            states = [run(window) for window in states]
    with model.head() as predict:
        return torch.stack([predict(window) for window in states])


def on_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_models(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    converted, source = convert(folder, tmp_path / "out", method="exact").output, open_source(str(folder))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(converted))
    for path, meta, weights in (
        (folder, source.meta_model, source.held_tensors),
        (converted, empty, as_held(SafetensorsReader(converted), empty)),
    ):
        before = shapes(meta)
        streamed = StreamedModel(source, meta, weights)
        with torch.inference_mode():
            whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            expected = whole(windows()).logits
        torch.testing.assert_close(streamed_logits(streamed, windows()), expected, rtol=1e-4, atol=1e-4)
        assert on_meta(meta)
        assert shapes(meta) == before


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and its exact form."""
    folder = tmp_path_factory.mktemp("streamed")
    source = save_source(folder / "source", dtype=torch.float32)
    return source, convert(source, folder / "out", method="exact").output


def test_one_layer_of_either_is_in_memory(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[PreTrainedModel] = []
    original_init, original_layer, held = StreamedModel.__init__, StreamedModel.layer, []

    def note(self: StreamedModel, family: object, model: PreTrainedModel, *others: object) -> None:
        opened.append(model)
        original_init(self, family, model, *others)

    def count(self: StreamedModel, layer: int) -> object:
        held.append(sum(not on_meta(block) for model in opened for block in model.model.layers))
        return original_layer(self, layer)

    monkeypatch.setattr(StreamedModel, "__init__", note)
    monkeypatch.setattr(StreamedModel, "layer", count)
    monkeypatch.setattr(whole_model, "load_model", lambda *_: pytest.fail("a model was loaded whole"))
    source, converted = folders
    verify_checkpoint(converted, open_source(str(source)), {"text": windows()}, silent_progress(), allowed_bytes=0)
    assert len(opened) == 2
    assert held == [0] * (2 * LAYERS)


def test_figures_do_not_depend_on_the_blocks(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, converted = open_source(str(folders[0])), folders[1]
    texts = {"a": windows(3), "b": windows(5)[3:]}
    together = verify_checkpoint(converted, source, texts, silent_progress())
    monkeypatch.setattr(compare, "_BLOCK_TOKENS", 2 * CONTEXT)
    assert verify_checkpoint(converted, source, texts, silent_progress()) == together


@pytest.mark.usefixtures("with_continuations")
@pytest.mark.parametrize(
    ("available", "allowed", "reason"),
    [
        (10**12, 10**3, r"it takes \d{3}\.\d kB of memory, and the conversion 1\.0 kB; mla verify does it"),
        (10**3, None, r"it takes \d{3}\.\d kB of memory, and 1\.0 kB are available"),
        (10**12, None, None),
        (10**12, 10**9, None),
    ],
)
def test_whole_models_are_loaded_where_they_fit(
    folders: tuple[Path, Path],
    available: int,
    allowed: int | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": available}))
    source, texts = open_source(str(folders[0])), {"text": windows()}
    found = verify_checkpoint(folders[1], source, texts, silent_progress(), allowed)
    shown = io.StringIO()
    for table in verification_tables(found):
        Console(file=shown, width=200).print(table)
    if reason is None:
        assert found.whole_model is not None
        assert found.left_out is None
        assert found.as_json()["greedy_match"] == 1.0
        assert "equal greedy tokens of 32" in shown.getvalue()
    else:
        assert found.whole_model is None
        assert re.fullmatch(reason, found.left_out)
        assert "greedy_match" not in found.as_json()
        assert f"(routes, decoding, greedy tokens): {found.left_out}." in " ".join(shown.getvalue().split())


def test_a_conversion_tells_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**3}))
    conversion = convert(save_source(tmp_path / "source"), tmp_path / "out", method="exact")
    reason = conversion.report.verification.left_out
    assert reason is not None
    for file in ("README.md", "report.json", "conversion.txt"):
        assert reason in " ".join((conversion.output / file).read_text().split()), file
