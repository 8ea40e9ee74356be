"""A conversion that is stopped anywhere goes on with the same command, to the same bytes."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from prepared_processes import run_prepared
from tiny_source import LAYERS, convert, save_source, write_text

from conversion.devices.choice import CPU
from conversion.errors import (
    BudgetError,
    CalibrationError,
    ConversionError,
    JournalError,
    OutputError,
    SourceError,
    VerificationError,
)
from conversion.pipeline.conversion import STAGES
from conversion.pipeline.work.journal import WorkFolder

RECIPE = {"cache": "50%", "tokens": 256}
PREPARED = 3
"""Times that the journal is saved before anything is measured: when it is made, and behind two stages."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], int]:
    """A source beside its text, what its conversion gives, and how often that saves the journal."""
    folder = tmp_path_factory.mktemp("unbroken")
    source, text = save_source(folder / "source"), write_text(folder / "text.txt")
    saves = 0
    original = WorkFolder.save

    def count(self: WorkFolder) -> None:
        nonlocal saves
        saves += 1
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save", count)
        output = convert(source, folder / "out", calibration=str(text), **RECIPE).output
    return folder, contents(output), saves


def stop_at(step: int, *, before: bool) -> Callable[[WorkFolder], None]:
    """A ``save`` that is interrupted at its ``step``-th call, before or after it has written the journal."""
    original, calls = WorkFolder.save, 0

    def save(self: WorkFolder) -> None:
        nonlocal calls
        calls += 1
        if calls == step and before:
            raise KeyboardInterrupt
        original(self)
        if calls == step:
            raise KeyboardInterrupt

    return save


def test_journal_is_saved_after_every_layer_of_both_passes(unbroken: tuple[Path, dict[str, bytes], int]) -> None:
    assert unbroken[2] >= 2 * LAYERS + 2


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("step", range(1, 2 * LAYERS + 4))
def test_same_bytes_after_an_interruption(
    step: int, before: bool, unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path
) -> None:
    folder, expected, _ = unbroken
    arguments = {"calibration": str(folder / "text.txt"), **RECIPE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save", stop_at(step, before=before))
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "source", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    assert contents(convert(folder / "source", tmp_path / "out", **arguments).output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_same_bytes_after_a_kill(unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path) -> None:
    folder, expected, _ = unbroken
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\n"
        "from conversion.pipeline.work.journal import WorkFolder\n"
        "from conversion.cli import main\n"
        "original = WorkFolder.save\n"
        "def save(self):\n"
        "    original(self)\n"
        "    if self.journal.converted == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "WorkFolder.save = save\n"
        "main()\n"
    )
    options = ("--cache", "50%", "--tokens", 256, "--calibration", folder / "text.txt")
    killed = run_prepared(script, "convert", folder / "source", tmp_path / "out", *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    recipe = {"calibration": str(folder / "text.txt"), **RECIPE}
    assert contents(convert(folder / "source", tmp_path / "out", **recipe).output) == expected


def test_the_work_done_is_not_done_again(
    unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = unbroken
    arguments = {"calibration": str(folder / "text.txt"), **RECIPE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save", stop_at(PREPARED + LAYERS + 3, before=False))
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "source", tmp_path / "out", **arguments)

    def measured_again(*_: object) -> None:
        raise AssertionError("statistics were taken again")

    monkeypatch.setattr("conversion.methods.attention_aware.method.AttentionAwareMethod.statistics", measured_again)
    assert convert(folder / "source", tmp_path / "out", **arguments).output.is_dir()


@pytest.fixture
def half_done(unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path) -> Callable[..., object]:
    """An interrupted conversion; the function goes on with it, other settings replacing its own."""
    folder, _, _ = unbroken
    arguments = {"calibration": str(folder / "text.txt"), **RECIPE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save", stop_at(PREPARED + 2, before=False))
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "source", tmp_path / "out", **arguments)
    return lambda **changed: convert(folder / "source", tmp_path / "out", **(arguments | changed))


@pytest.mark.parametrize("changed", [{"cache": "75%"}, {"seed": 1}, {"method": "exact", "cache": None}])
def test_another_recipe_does_not_go_on_from_it(changed: dict, half_done: Callable[..., object]) -> None:
    with pytest.raises(JournalError, match=r"unfinished conversion with .*delete the folder"):
        half_done(**changed)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"measured": 1}', b'{"identity": {}, "measured": "x"}'])
def test_damaged_journal(damage: bytes, half_done: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "journal.json").write_bytes(damage)
    with pytest.raises(JournalError, match=r"journal .* is damaged; delete"):
        half_done()
    assert not (tmp_path / "out").exists()


def test_lost_journal_is_not_overwritten(half_done: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "journal.json").unlink()
    with pytest.raises(JournalError, match="no journal"):
        half_done()


@pytest.mark.parametrize("file", ["statistics-00000.safetensors", "hidden-states-00002-00000.safetensors"])
def test_damaged_intermediate_file(file: str, half_done: Callable[..., object], tmp_path: Path) -> None:
    path = tmp_path / ".out.partial" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(JournalError, match=f"{file} is missing or damaged"):
        half_done()


def test_changed_source_does_not_go_on(
    half_done: Callable[..., object], unbroken: tuple[Path, dict[str, bytes], int]
) -> None:
    config = unbroken[0] / "source" / "generation_config.json"
    before = config.read_text()
    config.write_text(before + "\n")
    try:
        with pytest.raises(JournalError, match="source files"):
            half_done()
    finally:
        config.write_text(before)


def test_changed_calibration_text_does_not_go_on(
    half_done: Callable[..., object], unbroken: tuple[Path, dict[str, bytes], int]
) -> None:
    text = unbroken[0] / "text.txt"
    before = text.read_text()
    text.write_text(before[::-1])
    try:
        with pytest.raises(JournalError, match="calibration tokens"):
            half_done()
    finally:
        text.write_text(before)


def test_two_processes_do_not_share_a_work_folder(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", {}, CPU), pytest.raises(JournalError, match="another process"):
        WorkFolder(tmp_path / "out", {}, CPU).__enter__()


@pytest.fixture
def killed_after_publishing(unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path) -> dict[str, str]:
    """The recipe of a conversion that was killed when its output had its name, and its work folder was still there."""
    folder, _, _ = unbroken
    arguments = {"calibration": str(folder / "text.txt"), **RECIPE}

    original = shutil.rmtree

    def kill(path: Path, *others: object, **named: object) -> None:
        if str(path).endswith(".partial"):
            raise KeyboardInterrupt
        original(path, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "source", tmp_path / "out", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    return arguments


def test_what_a_kill_after_publishing_left_is_deleted(
    killed_after_publishing: dict[str, str], unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path
) -> None:
    folder, expected, _ = unbroken
    with pytest.raises(OutputError, match="exists already"):
        convert(folder / "source", tmp_path / "out", **killed_after_publishing)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("changed", [{}, {"seed": 1}])
def test_an_output_that_was_moved_away_is_made_again(
    killed_after_publishing: dict[str, str],
    unbroken: tuple[Path, dict[str, bytes], int],
    tmp_path: Path,
    changed: dict[str, int],
) -> None:
    folder, expected, _ = unbroken
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    output = convert(folder / "source", tmp_path / "out", **(killed_after_publishing | changed)).output
    assert (contents(output) == expected) == (not changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_unfinished_work_beside_an_output_is_kept(half_done: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        half_done()
    (tmp_path / "out").rmdir()
    assert (tmp_path / ".out.partial" / "statistics-00000.safetensors").is_file()
    half_done()


@pytest.mark.parametrize("kind", [SourceError, BudgetError, CalibrationError, VerificationError])
@pytest.mark.parametrize("moment", ["preflight", "measure", "allocate", "convert_layers", "verify", "report"])
def test_a_refusal_leaves_nothing(
    kind: type[ConversionError],
    moment: str,
    unbroken: tuple[Path, dict[str, bytes], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise kind("refused")

    refuse.__name__ = moment
    stages = [refuse if stage.__name__ == moment else stage for stage in STAGES]
    assert refuse in stages
    monkeypatch.setattr("conversion.pipeline.conversion.STAGES", stages)
    with pytest.raises(kind):
        convert(unbroken[0] / "source", tmp_path / "out", calibration=str(unbroken[0] / "text.txt"), **RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_an_unforeseen_error_leaves_nothing_where_nothing_is_done(
    unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    for function, left in (("preflight.check_weights", []), ("convert_layers.Refitting", [".out.partial"])):
        with monkeypatch.context() as patch:
            patch.setattr(f"conversion.pipeline.stages.{function}", fail)
            with pytest.raises(ZeroDivisionError):
                convert(unbroken[0] / "source", tmp_path / "out", calibration=str(unbroken[0] / "text.txt"), **RECIPE)
        assert [path.name for path in tmp_path.iterdir()] == left


def test_statistics_of_something_else_leave_nothing(
    unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path
) -> None:
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "letter.txt").write_text("mine")
    arguments = {"calibration": str(unbroken[0] / "text.txt"), "statistics": tmp_path / "statistics", **RECIPE}
    with pytest.raises(JournalError, match="no statistics"):
        convert(unbroken[0] / "source", tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*_: object, **__: object) -> None:
    raise Exception("No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("transformers.PreTrainedConfig.save_pretrained", no_space),
        ("transformers.GenerationConfig.save_pretrained", no_space),
        ("transformers.PreTrainedTokenizerFast.save_pretrained", no_space_in_rust),
        ("conversion.pipeline.stages.report.write_report", no_space),
        ("conversion.pipeline.stages.report.write_card", no_space),
        ("conversion.pipeline.work.measurements.write_text", no_space),
        ("conversion.pipeline.work.measurements.write_tensors", no_space_in_rust),
        ("pathlib.Path.rename", no_space),
    ],
)
def test_disk_that_is_full_for_any_file(
    function: str, failure: Callable[..., None], unbroken: tuple[Path, dict[str, bytes], int], tmp_path: Path
) -> None:
    folder = unbroken[0]
    arguments = {"calibration": str(folder / "text.txt"), "method": "transmla", "cache": "60%", "tokens": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, failure)
        with pytest.raises(OutputError, match=r"(?i)no space left .*run the same command again"):
            convert(folder / "source", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    convert(folder / "source", tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
