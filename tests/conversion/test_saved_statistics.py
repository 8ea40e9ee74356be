"""What one conversion measured on the text serves another budget, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_source import LAYERS, convert, save_source, write_text

from conversion.devices.choice import CPU
from conversion.errors import JournalError, OutputError
from conversion.methods.attention_aware.method import AttentionAwareMethod
from conversion.pipeline.work.measurements import SharedMeasurements


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``source``, ``text.txt``, ``direct`` (50%, measured for itself), and ``statistics`` of a 75% conversion."""
    folder = tmp_path_factory.mktemp("statistics")
    save_source(folder / "source")
    write_text(folder / "text.txt")
    recipe = {"tokens": 256, "calibration": str(folder / "text.txt")}
    convert(folder / "source", folder / "direct", cache="50%", **recipe)
    convert(folder / "source", folder / "first", cache="75%", statistics=folder / "statistics", **recipe)
    return folder


def from_saved(folder: Path, output: Path, **changed: object) -> Path:
    recipe = {"cache": "50%", "tokens": 256, "calibration": str(folder / "text.txt")} | changed
    return convert(folder / "source", output, statistics=folder / "statistics", **recipe).output


def refuse_to_measure(*_: object) -> None:
    raise AssertionError("measured again")


def test_another_budget_gives_the_same_bytes_without_measuring(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionAwareMethod, "statistics", refuse_to_measure)
    before = contents(folder / "statistics")
    assert contents(from_saved(folder, tmp_path / "out")) == contents(folder / "direct")
    assert contents(folder / "statistics") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"seed": 1}, "calibration tokens|seed"),
        ({"tokens": 128}, "calibration tokens"),
        ({"method": "transmla"}, "method"),
    ],
)
def test_statistics_of_something_else_are_refused(folder: Path, tmp_path: Path, changed: dict, name: str) -> None:
    with pytest.raises(JournalError, match=rf"are of ({name}) .*choose another folder"):
        from_saved(folder, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    other = save_source(tmp_path / "other", initializer_range=0.2)
    recipe = {"cache": "50%", "tokens": 256, "calibration": str(folder / "text.txt")}
    with pytest.raises(JournalError, match="are of source files"):
        convert(other, tmp_path / "out", statistics=folder / "statistics", **recipe)


def test_measuring_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"cache": "50%", "tokens": 256, "calibration": str(folder / "text.txt")}
    recipe["statistics"] = tmp_path / "statistics"
    original, measured = AttentionAwareMethod.statistics, 0

    def stop_at_the_last(self: AttentionAwareMethod, *arguments: object) -> object:
        nonlocal measured
        measured += 1
        if measured == LAYERS:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(AttentionAwareMethod, "statistics", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        convert(folder / "source", tmp_path / "out", **recipe)
    # Another output may go on from there.
    assert contents(convert(folder / "source", tmp_path / "second", **recipe).output) == contents(folder / "direct")
    assert measured == LAYERS + 1


def test_a_folder_of_something_else_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JournalError, match="choose an empty or a new folder"), SharedMeasurements(tmp_path, {}, CPU):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes.txt is a file; choose another folder for statistics"):
        SharedMeasurements(tmp_path / "notes.txt", {}, CPU).__enter__()


def test_two_conversions_do_not_measure_into_one_folder(tmp_path: Path) -> None:
    shared = tmp_path / "statistics"
    with SharedMeasurements(shared, {}, CPU), pytest.raises(JournalError, match="another process"):
        SharedMeasurements(shared, {}, CPU).__enter__()


def test_damaged_journal(tmp_path: Path) -> None:
    with SharedMeasurements(tmp_path / "statistics", {}, CPU):
        pass
    (tmp_path / "statistics" / "measurements.json").write_text("{")
    with pytest.raises(JournalError, match="is damaged"), SharedMeasurements(tmp_path / "statistics", {}, CPU):
        pass
