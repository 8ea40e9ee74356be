"""What a newcomer reads: help that fits a terminal, with an example that works; hints at what was meant."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from tiny_source import convert, save_source, write_text
from typer.main import get_command
from typer.testing import CliRunner

from conversion.checkpoint.paths import did_you_mean
from conversion.cli import COMMANDS, app
from conversion.exporters import EXPORTERS

WIDTH = 100
NAMES = [command.__name__ for command in COMMANDS]
LONG = ("sweep", "convert", "run", "verify", "heal", "export", "push")
AS_JSON = ("sweep", "inspect", "plan", "verify", "compare", "families", "backends")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``source`` and ``exact``."""
    folder = tmp_path_factory.mktemp("help")
    save_source(folder / "source", dtype=torch.float32)
    convert(folder / "source", folder / "exact", method="exact")
    return folder


def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_fits_a_terminal(name: str | None) -> None:
    shown = help_of(*([name] if name else []))
    assert max(map(len, shown.splitlines())) <= WIDTH
    # Nothing was cut: a column that does not fit ends in an ellipsis.
    assert "…" not in shown


@pytest.mark.parametrize("name", NAMES)
def test_help_has_one_example_that_is_understood(name: str) -> None:
    shown = help_of(name)
    examples = [line.strip() for line in shown.splitlines() if line.strip().startswith("Example: ")]
    assert len(examples) == 1, shown
    program, command, *arguments = shlex.split(examples[0].removeprefix("Example: "))
    assert (program, command) == ("mla", name)
    # It stands on one line, and every argument and option in it is known.
    assert examples[0] in inspect.getdoc(COMMANDS[NAMES.index(name)])
    get_command(app).get_command(None, name).make_context(name, arguments)


def test_every_command_says_what_it_is_for() -> None:
    shown = help_of()
    for name in NAMES:
        assert re.search(rf"│ {name} +[A-Z]", shown)
    assert "mla sweep MODEL OUT" in shown
    assert NAMES[0] == "sweep"


def test_options_mean_the_same_everywhere() -> None:
    takes = {
        name: {option for p in get_command(app).get_command(None, name).params for option in p.opts} for name in NAMES
    }
    assert {name for name in NAMES if "--quiet" in takes[name]} == set(LONG)
    assert {name for name in NAMES if "--json" in takes[name]} == set(AS_JSON)
    assert {name for name in NAMES if "--dry-run" in takes[name]} == {"sweep", "convert", "run", "push"}


def test_flags_take_no_value() -> None:
    for name in NAMES:
        for line in help_of(name).splitlines():
            assert "<bool>" not in line or "--help" in line, line


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(("convert", "a", "b", "--cach", "50%"), "--cache"), (("inspekt",), "inspect"), (("swep", "a", "b"), "sweep")],
)
def test_the_nearest_option_or_command_is_named(arguments: tuple[str, ...], hint: str) -> None:
    result = mla(*arguments)
    assert result.exit_code == 2
    assert hint in result.stderr


def test_the_nearest_path_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert_refused(mla("inspect", "./sorce"), "./sorce does not exist (did you mean source?); give a folder")
    assert_refused(mla("inspect", "sorce"), "(did you mean source?), and the Hub does not give it")
    assert_refused(mla("verify", "exakt", "--against", "source"), "did you mean exact?")
    assert_refused(mla("inspect", "--config", "exact/confg.json"), "did you mean exact/config.json?")
    assert_refused(mla("inspect", "--config", "exat/config.json"), "did you mean exact/config.json?")
    write_text(tmp_path / "notes.txt")
    for missing in (tmp_path / "note.txt", tmp_path / "nodes.txt"):
        refused = mla("convert", "source", tmp_path / "out", "--calibration", missing)
        assert_refused(refused, "does not exist (did you mean", "notes.txt?)")
    assert_refused(mla("verify", "exact", "--against", "source", "--text", tmp_path / "nots.txt"), "notes.txt?)")
    assert_refused(mla("run", tmp_path / "notes.tx"), "as a recipe: No such file", "notes.txt?)")


def test_the_stages_that_there_are_are_named(folder: Path) -> None:
    refused = mla("heal", folder / "exact", "--teacher", "x", "--minutes", 1, "--stages", "layer")
    assert_refused(refused, "stages.0 is 'layer': choose one of 'layers', 'logits', 'long'")


def test_no_path_is_named_where_none_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    (tmp_path / ".hidden").mkdir()
    assert did_you_mean("gemma") == ""
    assert did_you_mean("hidden") == ""
    assert did_you_mean("lama") == " (did you mean llama?)"
    # What is asked for below it is not there.
    assert did_you_mean("lama/config.json") == ""
    assert did_you_mean(tmp_path / "lama") == f" (did you mean {tmp_path / 'llama'}?)"


def test_what_comes_next(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    shown = mla("convert", "source", tmp_path / "my model", "--method", "exact").stdout
    quoted = f"'{tmp_path / 'my model'}'"
    for command in ("verify {} --against source", "chat {}", "heal {} --teacher source", "export {} DIR"):
        assert f"mla {command.format(quoted)}" in shown
    exported = mla("export", "exact", tmp_path / "vllm", "--to", "vllm").stdout
    assert f"vllm serve {tmp_path / 'vllm'}" in exported
    assert all(exporter.runs for exporter in EXPORTERS.values())


def test_quiet_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for arguments in (
        ("convert", "source", tmp_path / "out", "--method", "exact"),
        ("verify", "exact", "--against", "source", "--windows", 1),
        ("export", "exact", tmp_path / "vllm", "--to", "vllm"),
    ):
        result = mla(*arguments, "--quiet")
        assert result.exit_code == 0, result.output
        assert result.stdout.count("\n") == 1, result.stdout
        assert result.stderr == ""


def test_families_as_json() -> None:
    found = json.loads(mla("families", "--json").stdout)["families"]
    assert "llama" in {family["name"] for family in found}
    engines = json.loads(mla("families", "--engines", "--json").stdout)["engines"]
    assert {row["family"] for row in engines} == {family["name"] for family in found}
