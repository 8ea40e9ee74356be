"""What conversions, verifications and healings leave: `report.json`, and the page of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from healing_runs import LOGITS, prepare, run, small_default
from tiny_source import convert, save_source, write_text

from conversion.checkpoint.location import locate
from conversion.evaluation.held_bytes import held_bytes
from conversion.reporting.memory_by_context import memory_by_context
from conversion.reporting.report_files import JSON_NAME, read_report
from conversion.sources import open_source

pytestmark = pytest.mark.usefixtures("with_pages")
HTML_NAME = "report.html"


@pytest.fixture(scope="module")
def folder(with_pages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    save_source(folder / "source", dtype=torch.float32)
    text = write_text(folder / "text.txt")
    convert(folder / "source", folder / "coded", cache="40%", calibration=str(text), tokens=256)
    return folder


def test_a_conversion_leaves_report_and_page(folder: Path) -> None:
    report = json.loads((folder / "coded" / JSON_NAME).read_text())
    assert report["kind"] == "conversion"
    assert all(layer["sensitivity"] > 0 for layer in report["layers"])
    assert len(report["verification"]["continuations"]) == 3
    page = (folder / "coded" / HTML_NAME).read_text()
    found = report["verification"]
    assert f"{found['cache_bytes_per_token']:,} bytes a token instead of" in page
    for domain in found["domains"]:
        assert f'data-value="{domain["kl"]}"' in page
    assert str(folder) not in page


def test_memory_is_what_caches_hold(folder: Path) -> None:
    config = locate(str(folder / "coded")).config()
    report = json.loads((folder / "coded" / JSON_NAME).read_text())
    memory = report["memory"]
    for tokens, held in zip(memory["contexts"][:3], memory["converted"][:3], strict=True):
        measured = held_bytes(config, tokens, config.dtype)
        # First tokens and slack are those of a short window.
        assert held == pytest.approx(measured, rel=0.02)
    source = open_source(str(folder / "source"))
    assert memory["source"] == [tokens * source.cache_bytes_per_token() for tokens in memory["contexts"]]


def test_memory_with_a_window_stops_growing(tmp_path: Path) -> None:
    from tiny_families import save_family

    source = open_source(str(save_family(tmp_path / "source", "mistral", sliding_window=16)))
    converted = convert(tmp_path / "source", tmp_path / "out", method="exact")
    found = memory_by_context(source, locate(str(tmp_path / "out")).config(), converted.report.verification)
    assert len(set(found["source"])) == 1
    assert len(set(found["converted"])) == 1


def test_a_verification_tells_where_it_is_told_and_touches_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "coded").iterdir()}
    arguments = ("verify", folder / "coded", "--against", folder / "source", "--windows", "2")
    silent = mla(*arguments)
    assert silent.exit_code == 0, silent.output
    told = mla(*arguments, "--report", tmp_path / "told")
    assert told.exit_code == 0, told.output
    assert told.stdout.endswith(f"{tmp_path}/told/report.html shows what was found.\n")
    assert "report.html" not in silent.stdout
    assert {path: path.read_bytes() for path in (folder / "coded").iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "told").iterdir()) == [HTML_NAME, JSON_NAME]
    report = read_report(tmp_path / "told")
    assert (report["kind"], report["model"], report["against"]) == ("verification", "coded", "source")
    assert report["origin"] == read_report(folder / "coded")
    page = (tmp_path / "told" / HTML_NAME).read_text()
    assert "Layer by layer" in page
    assert [path.name for path in tmp_path.iterdir()] == ["told"]


def test_a_report_that_is_there_is_not_replaced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.evaluation.assess.assess", lambda *_: pytest.fail("it was measured first"))
    (tmp_path / "told").mkdir()
    refused = mla("verify", folder / "coded", "--against", folder / "source", "--report", tmp_path / "told")
    assert_refused(refused, "told exists already")


def test_of_damaged_reports_none_is_read(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    for content in ("{", "[]", '{"recipe": {}}', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (tmp_path / JSON_NAME).write_text(content, encoding="latin-1")
        assert read_report(tmp_path) is None


@pytest.fixture(scope="module")
def checkpoints(with_pages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with small_default():
        yield prepare(tmp_path_factory.mktemp("healing"), "llama")


def test_a_healing_keeps_the_report_of_what_it_healed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    run(checkpoints, tmp_path / "healed", stages=LOGITS, steps=10)
    report = read_report(tmp_path / "healed")
    assert report["kind"] == "healing"
    assert report["origin"] == read_report(checkpoints["llama_mla"])
    page = (tmp_path / "healed" / HTML_NAME).read_text()
    assert "Healing" in page
    assert "Layer by layer" in page
    run(checkpoints | {"llama_mla": tmp_path / "healed"}, tmp_path / "again", stages=LOGITS, steps=2)
    assert read_report(tmp_path / "again")["origin"]["origin"] == report["origin"]
    assert "Layer by layer" in (tmp_path / "again" / HTML_NAME).read_text()


def test_a_checkpoint_without_a_report_is_healed_all_the_same(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for path in checkpoints["llama_mla"].iterdir():
        if path.name != JSON_NAME:
            (tmp_path / "old").mkdir(exist_ok=True)
            (tmp_path / "old" / path.name).write_bytes(path.read_bytes())
    run(checkpoints | {"llama_mla": tmp_path / "old"}, tmp_path / "healed", stages=LOGITS, steps=2)
    assert read_report(tmp_path / "healed")["origin"] is None
    assert (tmp_path / "healed" / HTML_NAME).is_file()
