"""Data flows down a list of packages, and imports point up in it; nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIST = [
    *("errors", "terminal", "progress", "layers", "devices", "checkpoint", "sources", "text", "forward", "methods"),
    *(
        "recipe",
        "planning",
        "evaluation",
        "reporting",
        "pipeline",
        "healing",
        "sweep",
        "answering",
        "exporters",
        "__init__",
        "cli",
    ),
]
"""Of `conversion`, as in ARCHITECTURE.md."""
MOST_MODULES = 6
"""At the top of `conversion`, beside its packages."""
LONGEST, SHORTEST = 300, 15
"""Lines of a module."""


@cache
def modules(package: str) -> dict[str, Path]:
    """Files by dotted name, ``package`` and its own ``__init__`` included."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(package: str, name: str) -> Iterator[str]:
    """Modules of the package that a module imports, wherever in its file: also in functions, also for types alone."""
    known, path = modules(package), modules(package)[name]
    inside = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = inside[: len(inside) - node.level + 1] if node.level else []
        base = ".".join([*above, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
            if target in known and target != name:
                yield target


def room(name: str) -> str:
    """The entry of the list that a module of `conversion` belongs to."""
    return [*name.split("."), "__init__"][1]


def test_imports_point_up_the_list() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in modules("conversion")
        for target in imported("conversion", name)
        if LIST.index(room(target)) > LIST.index(room(name))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["conversion", "modeling_mla"])
def test_nothing_imports_in_a_circle(package: str) -> None:
    left = {name: set(imported(package, name)) for name in modules(package)}
    while free := {name for name, targets in left.items() if not targets}:
        left = {name: targets - free for name, targets in left.items() if name not in free}
    assert left == {}, "each of these imports another one of them"


def test_every_room_is_in_the_list() -> None:
    rooms = {room(name) for name in modules("conversion")}
    assert rooms == set(LIST)
    files = [name for name in rooms if (ROOT / "conversion" / f"{name}.py").is_file() and name != "__init__"]
    assert len(files) <= MOST_MODULES, files


@pytest.mark.parametrize("package", ["conversion", "modeling_mla"])
def test_modules_are_neither_long_nor_empty(package: str) -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(package).items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
    empty = {name for name, count in lines.items() if count < SHORTEST and modules(package)[name].stem != "__init__"}
    assert empty <= {"conversion.cli.__main__"}


def test_packages_say_what_goes_in_and_what_comes_out() -> None:
    packages = [name for name, path in modules("conversion").items() if path.name == "__init__.py"]
    silent = []
    for name in packages:
        text = ast.get_docstring(ast.parse(modules("conversion")[name].read_text(encoding="utf-8"))) or ""
        if name != "conversion" and not ("In: " in text and "Out: " in text):
            silent.append(name)
    assert silent == []
