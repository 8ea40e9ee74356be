"""The benchmark of methods and budgets, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_source import CONTEXT, save_source, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Typer
from typer.testing import CliRunner, Result

from conversion.evaluation.scores import perplexity
from conversion.methods.transmla import TransMLAMethod

_BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, _BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    save_source(folder / "source", dtype=torch.float32)
    write_text(folder / "text.txt")
    return folder


def benchmark(folder: Path, results: Path, *options: str) -> Result:
    app = Typer()
    app.command()(load("quality").main)
    command = [str(folder / "source"), str(results), "--text", str(folder / "text.txt")]
    command += ["--calibration", str(folder / "text.txt"), "--tokens", "256", "--windows", "2", *options]
    return CliRunner().invoke(app, command)


def test_table_picture_and_one_calibration_a_method(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = 0
    original = TransMLAMethod.statistics

    def count(self: TransMLAMethod, *arguments: object):
        nonlocal measured
        measured += 1
        return original(self, *arguments)

    monkeypatch.setattr(TransMLAMethod, "statistics", count)
    finished = benchmark(folder, tmp_path, "--methods", "exact,transmla", "--budgets", "100%,50%", "--json")
    assert finished.exit_code == 0, finished.output
    found = json.loads(finished.stdout)
    # Three layers in both passes of the method, for both budgets.
    assert measured == 2 * 3
    assert [(row["method"], row["cache"]) for row in found["rows"]] == [
        ("exact", "100%"), ("transmla", "100%"), ("transmla", "50%"),
    ]  # fmt: skip
    source = found["perplexity_source"]
    assert found["rows"][0]["perplexity"] == pytest.approx(source, rel=1e-5)
    assert abs(found["rows"][2]["perplexity"] / source - 1) > 1e-4
    assert found["rows"][2]["cache_share"] == 0.5
    assert json.loads((tmp_path / "quality.json").read_text()) == found
    assert f"{found['rows'][2]['perplexity']:.2f}" in (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.json", "quality.md", "quality.png"]

    assert (found["rows"][2]["latent_bits"], found["rows"][2]["rope_bits"]) == (16, 16)

    # What is there is kept, and rows of other settings are not mixed in.
    again = benchmark(folder, tmp_path, "--methods", "exact,transmla", "--budgets", "100%,50%", "--json")
    assert json.loads(again.stdout) == found
    assert measured == 2 * 3
    assert "other settings" in benchmark(folder, tmp_path, "--seed", "1").output


def test_budgets_are_bytes_whatever_they_are_spent_on(folder: Path, tmp_path: Path) -> None:
    options = ["--methods", "attention_aware", "--budgets", "30%", "--json"]
    for bits in ([], ["--bits", "16"]):
        finished = benchmark(folder, tmp_path, *options, *bits)
        assert finished.exit_code == 0, finished.output
    coded, plain = json.loads(finished.stdout)["rows"]
    assert (coded["asked_bits"], plain["asked_bits"]) == (None, 16)
    assert coded["latent_bits"] < 16 == plain["latent_bits"]
    assert coded["kv_lora_rank"] > 1.5 * plain["kv_lora_rank"]
    written = (tmp_path / "quality.md").read_text()
    assert f"{coded['rope_bits']:g} + {coded['latent_bits']:g}" in written
    # All that a window of 64 tokens holds: first tokens, which are as they are, take much of it.
    assert 0.2 < coded["cache_share"] < 0.5
    assert plain["cache_share"] == pytest.approx(0.3, abs=0.02)


def test_perplexity_is_over_all_predicted_tokens(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    ids = torch.tensor(tokenizer((folder / "text.txt").read_text())["input_ids"][: 2 * CONTEXT]).view(2, CONTEXT)
    expected = torch.stack([model(window[None], labels=window[None]).loss for window in ids]).mean().exp()
    assert perplexity(model, ids) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_wikitext_is_detokenised() -> None:
    detokenise = load("wikitext").detokenise
    found = detokenise('He said , " it \'s a well @-@ known ( old ) <unk> , worth 1 @,@ 000 . "')
    assert found == 'He said, "it\'s a well-known (old), worth 1,000."'
