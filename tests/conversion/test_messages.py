"""Messages: one short line that shows names as they are, on any terminal, and says what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import LONGEST, assert_refused, mla
from prepared_processes import run_prepared
from test_reader import write_gguf
from tiny_source import save_source, tiny_llama

from conversion.checkpoint.atomic import require_space
from conversion.checkpoint.paths import require_free
from conversion.errors import ConversionError, OutputError, first_line, one_line
from conversion.recipe import make_recipe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "source", dtype=torch.float32)


@pytest.mark.parametrize("name", ["out[v2]", "out[bold]x", "out:smile:", "[red]out", "out 😄"])
def test_names_are_no_markup(name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    strange = source.rename(tmp_path / f"source{name}")
    result = mla("convert", strange.name, name, "--method", "exact")
    assert result.exit_code == 0, result.output
    assert f"{name} is ready" in result.stdout
    assert f"{strange.name} → {name}" in result.stdout
    assert strange.name in (tmp_path / name / "conversion.txt").read_text(encoding="utf-8")
    assert_refused(mla("convert", strange.name, name, "--method", "exact"), f"{name} exists already")


@pytest.mark.parametrize("charset", ["latin-1", "ascii"])
def test_terminal_without_arrows_and_emoji(charset: str, source: Path, tmp_path: Path) -> None:
    planned = mla("plan", source, "--bits", "16", "--output", tmp_path / "out", charset=charset)
    assert planned.exit_code == 0, planned.output
    assert "768 -> 384" in planned.output
    result = mla("convert", source, tmp_path / "out 😄", "--method", "exact", charset=charset)
    assert result.exit_code == 0, result.output
    assert "out ? is ready" in result.output


def test_module_is_the_command() -> None:
    done = run_prepared("-m", "conversion.cli", "inspect", "./nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ./nowhere does not exist")


def test_messages_are_one_short_printable_line() -> None:
    name = "x" * 400
    message = str(ConversionError(f"{name} is not {name}\nbut \x1b[31m{name}; give another."))
    assert len(message) < LONGEST
    assert message.isprintable()
    assert message.startswith("xxx")
    assert message.endswith("; give another.")
    assert one_line("a short one → with 😄 and names of 100 characters " + "y" * 100) == (
        "a short one → with 😄 and names of 100 characters " + "y" * 100
    )
    assert len(one_line("many words " * 100)) < LONGEST


def test_reasons_of_other_libraries_are_short() -> None:
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\n  one \n two")) == "one"
    assert first_line(ValueError("Validation error for field 'x':\n    TypeError: no int")) == (
        "Validation error for field 'x': TypeError: no int"
    )
    assert first_line(ValueError("One sentence. " + "And others. " * 50)) == "One sentence"
    assert len(first_line(ValueError("x" * 1000))) <= 150


def test_output_name_that_is_too_long(source: Path, tmp_path: Path) -> None:
    for length in (243, 250, 300):
        result = mla("convert", source, tmp_path / "results" / ("o" * length), "--method", "exact")
        assert_refused(result, "too long", "255", "shorter")
    assert not (tmp_path / "results").exists()
    require_free(tmp_path / ("o" * 242), companions=[f".{'o' * 242}.partial"])


def test_output_that_is_a_link_to_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    assert_refused(mla("convert", source, tmp_path / "out", "--method", "exact"), "out", "link to nowhere", "delete")


def test_home_folder_is_expanded_once_and_early(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    source.rename(home / "source")
    assert mla("convert", "~/source", "~/out", "--method", "exact").exit_code == 0
    assert mla("verify", "~/out", "--against", "~/source", "--windows", 1).exit_code == 0
    assert mla("export", "~/out", "~/vllm", "--to", "vllm").exit_code == 0
    assert mla("inspect", "--config", "~/out/config.json", "--plot", "~/plot.png").exit_code == 0
    (home / "recipe.yaml").write_text("source: ~/source\noutput: ~/third\nmethod: exact\n")
    ran = mla("run", "~/recipe.yaml")
    assert ran.exit_code == 0
    assert f"{home}/third/report.html shows what was found." in ran.stdout
    assert {path.name for path in home.iterdir()} >= {"out", "vllm", "plot.png", "third"}
    assert list(elsewhere.iterdir()) == []
    made = make_recipe(source="m", output="o", calibration="~/text.txt", statistics="~/statistics")
    assert (made.calibration, made.statistics) == (str(home / "text.txt"), home / "statistics")
    assert_refused(mla("convert", "source", "~nobody-here/out"), "~nobody-here/out", "in full")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tokens", 0), ("--tokens", -1), ("--tokens", 2**63), ("--seed", -1), ("--seed", 2**63), ("--kv-lora-rank", 0)],
)
def test_number_out_of_range(option: str, value: int, source: Path, tmp_path: Path) -> None:
    assert_refused(mla("convert", source, tmp_path / "out", option, value), option[2:].replace("-", "_"), str(value))


def test_largest_seed_seeds_every_layer(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 200)
    options = ("--seed", 50_000_000, "--tokens", 128, "--calibration", tmp_path / "text.txt")
    assert mla("convert", source, tmp_path / "out", *options).exit_code == 0


def test_room_is_told_in_fitting_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"takes 2\.5 MB in .*1\.0 kB are free"):
        require_space(tmp_path, 2_500_000)


def test_parts_of_a_split_gguf(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "tiny-00001-of-00002.gguf", tiny_llama())
    for model in (tmp_path, first):
        assert_refused(mla("inspect", model), first.name, "2 parts", "llama-gguf-split --merge")


def test_path_that_the_system_refuses(source: Path, tmp_path: Path) -> None:
    result = mla("convert", source, tmp_path / "out", "--calibration", tmp_path / ("t" * 300 + ".txt"))
    assert_refused(result, "File name too long", str(tmp_path)[:20])
