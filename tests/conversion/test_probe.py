"""What a plan says of time comes from this machine, and what is compared with it from the conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_source import convert, save_source, write_text

from conversion.planning import costs, probe
from conversion.planning.costs import Costs
from conversion.planning.plan import make_plan
from conversion.planning.probe import Speed, measure_speed
from conversion.progress import peak_memory
from conversion.recipe import make_recipe
from conversion.sources import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("probe") / "source", dtype=torch.float32)


def planned(source: Path, monkeypatch: pytest.MonkeyPatch, speed: Speed, **recipe: Any) -> Costs:
    monkeypatch.setattr(costs, "measure_speed", lambda *_: speed)
    return make_plan(make_recipe(source=str(source), output="out", **recipe), open_source(str(source))).costs


def test_what_is_measured_is_a_speed(source: Path, tmp_path: Path) -> None:
    found = measure_speed(torch.device("cpu"), source)
    assert found.products > 1e6
    assert 0 < found.solving < 1e-3
    assert found.reading is not None
    assert found.reading > 1e3
    assert measure_speed(torch.device("cpu"), tmp_path).reading is None


def test_no_file_elsewhere_is_read(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    assert measure_speed(torch.device("cpu"), folder).reading is None


def test_products_are_counted_once_a_process(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_speed(torch.device("cpu"), source)
    monkeypatch.setattr(probe, "_seconds", lambda _: pytest.fail("measured again"))
    assert measure_speed(torch.device("cpu"), source).products == first.products


def test_a_slower_machine_takes_longer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = planned(source, monkeypatch, Speed(1e9, 1e-9, 1e9))
    for slower in (Speed(1e8, 1e-9, 1e9), Speed(1e9, 1e-5, 1e9), Speed(1e9, 1e-9, 1e4)):
        assert planned(source, monkeypatch, slower).seconds > fast.seconds + 1
    unread = planned(source, monkeypatch, Speed(1e9, 1e-9, None))
    assert unread.seconds <= fast.seconds
    assert (unread.memory_bytes, unread.disk_bytes) == (fast.memory_bytes, fast.disk_bytes)


def test_nothing_is_solved_or_read_twice_for_the_exact_form(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, solved = (planned(source, monkeypatch, Speed(1e9, c, None), method="exact") for c in (1e-9, 1.0))
    assert once == solved


def test_a_conversion_says_what_the_disk_held(source: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    statistics = tmp_path / "statistics"
    alone = convert(source, tmp_path / "alone", cache="75%", tokens=256, calibration=str(text))
    weights = (alone.output / "model.safetensors").stat().st_size
    assert weights < alone.disk_bytes < 20 * weights
    shared = convert(source, tmp_path / "shared", cache="75%", tokens=256, calibration=str(text), statistics=statistics)
    kept = sum(file.stat().st_size for file in statistics.iterdir())
    assert shared.disk_bytes >= kept + weights


def test_memory_is_that_of_the_process() -> None:
    before = peak_memory()
    assert 50e6 < before < 1e12
    block = torch.ones(2**28, dtype=torch.uint8)
    assert peak_memory() >= max(before, block.nbytes)
