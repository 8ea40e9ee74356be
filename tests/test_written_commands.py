"""Every command that a document names is one that is there, with the options that it is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from conversion.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", ".github/*.md", "conversion/**/*.md", "examples/**/*.md", "hub_configs/*.md")
    for path in ROOT.glob(pattern)
)
PREFIX = r"(?:mla|make|(?:python|torchrun .*?|accelerate launch) (?:-I )?examples/)"
_BLOCK = re.compile(r"```(?:bash|text)\n(.*?)```", re.DOTALL)
_SPAN = re.compile(rf"`({PREFIX}[^`\n]*)`")
_PLAIN = ("make", "mla")


def commands(text: str) -> list[list[str]]:
    """Of shell blocks and of code within sentences, by words, without comments."""
    lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += _SPAN.findall(_BLOCK.sub("", text))
    words = (shlex.split(line.replace("'", ""), comments=True) for line in lines)
    return [command for command in words if command and (command[0] in _PLAIN or _script(command))]


def _script(command: list[str]) -> str | None:
    return next((word for word in command[1:] if re.fullmatch(r"examples/[\w/]+\.py", word)), None)


def fault(command: list[str]) -> str | None:
    """What is wrong with it."""
    options = [word.partition("=")[0] for word in command if word.startswith("--") and len(word) > 2]
    if command[0] == "make":
        targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        known = {target for names in targets for target in names.split()}
        missing = [word for word in command[1:2] if word not in known]
        return f"no target {missing[0]}" if missing else None
    if command[0] == "mla":
        group: Any = typer.main.get_command(app)
        names = re.split(r"\|", "".join(command[1:])) if "|" in command else command[1:2]
        unknown = [name for name in names if name not in group.commands and not name.startswith(("-", "."))]
        if unknown:
            return f"no command {unknown[0]}"
        own = group.commands[names[0]].params if names and names[0] in group.commands else group.params
        known = {option for parameter in own for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        return next((f"no option {option}" for option in options if option not in known), None)
    script = ROOT / str(_script(command))
    if not script.is_file():
        return f"no file {script.name}"
    source, after = script.read_text(encoding="utf-8"), command[command.index(str(_script(command))) :]
    if script.name == "transformers_serve.py":
        return None
    given = [word for word in after if word.startswith("--")]
    found = (option for option in given if option not in source and option[2:].replace("-", "_") not in source)
    return next((f"no option {option}" for option in found), None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_there(document: Path) -> None:
    found = commands(document.read_text(encoding="utf-8"))
    assert [f"{shlex.join(command)}: {wrong}" for command in found if (wrong := fault(command))] == []


def test_they_are_found() -> None:
    assert sum(len(commands(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) > 60
    wrong = (
        "`mla konvert`, `mla convert A B --bit 3`, `make all`, `python examples/none.py`, `mla verify A --against B`"
    )
    assert [fault(command) for command in commands(wrong)] == [
        "no command konvert", "no option --bit", "no target all", "no file none.py", None,
    ]  # fmt: skip
