"""Every public name says what it takes, gives and refuses: what the API reference is made of.

That each has a docstring is what ruff checks (D1); here stands what it cannot see.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import modeling_mla

ROOT = Path(__file__).parents[1]
_TENSOR = r"(?:torch\.)?(?:Long)?Tensor(?: \| None)?"
_ONLY_TENSORS = re.compile(rf"{_TENSOR}|tuple\[(?:{_TENSOR}(?:, )?)+\](?: \| None)?")
_SHAPE = re.compile(r"\[[^\]]*\]|any shape|same shape")
_ELSEWHERE = re.compile(r"(?i)\b(?:as|of|in|see|what|shape that|errors as) `\w[\w.]*`|^`\w[\w.]*`;|with its errors")
"""A docstring may send its reader to another one."""


class Function(NamedTuple):
    """A public function or method, with the docstring of the class that it is in."""

    place: str
    node: ast.FunctionDef
    said: str
    said_of_class: str


@cache
def functions() -> tuple[Function, ...]:
    return tuple(
        function
        for package in ("modeling_mla", "conversion")
        for file in sorted((ROOT / package).rglob("*.py"))
        for function in _in(ast.parse(file.read_text(encoding="utf-8")), str(file.relative_to(ROOT)))
    )


def _in(parent: ast.Module | ast.ClassDef, place: str, said_of_class: str = "") -> Iterator[Function]:
    for node in parent.body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _in(node, f"{place} {node.name}", ast.get_docstring(node) or "")
        elif isinstance(node, ast.FunctionDef) and "override" not in map(ast.unparse, node.decorator_list):
            yield Function(f"{place} {node.name}", node, ast.get_docstring(node) or "", said_of_class)


def _raised(node: ast.FunctionDef) -> set[str]:
    errors = (found.exc for found in ast.walk(node) if isinstance(found, ast.Raise) and found.exc is not None)
    names = (ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in errors)
    return {name for name in names if re.fullmatch(r"\w+Error", name)}


def test_functions_tell_what_they_raise() -> None:
    """Commands do not: what they raise is one line on stderr."""
    silent = [
        f"{function.place}: {error}"
        for function in functions()
        if not function.place.startswith("conversion/cli/")
        for error in _raised(function.node)
        if error not in function.said + function.said_of_class and not _ELSEWHERE.search(function.said)
    ]
    assert silent == []


def test_tensors_have_their_shapes() -> None:
    silent = []
    for function in functions():
        arguments = (*function.node.args.args, *function.node.args.kwonlyargs)
        kinds = [argument.annotation for argument in arguments] + [function.node.returns]
        has_tensors = any(kind is not None and _ONLY_TENSORS.fullmatch(ast.unparse(kind)) for kind in kinds)
        told = _SHAPE.search(function.said + function.said_of_class) or _ELSEWHERE.search(function.said)
        if has_tensors and not told:
            silent.append(function.place)
    assert silent == []


def test_there_is_something_to_check() -> None:
    assert len(functions()) > 500
    assert sum(bool(_raised(function.node)) for function in functions()) > 50


@pytest.mark.parametrize("name", modeling_mla.__all__)
def test_what_the_package_exports_is_documented(name: str) -> None:
    said = getattr(modeling_mla, name).__doc__ or ""
    inherited = {base.__doc__ for base in getattr(modeling_mla, name).__mro__[1:]} if name.endswith("MLA") else set()
    assert said.strip()
    assert said not in inherited
