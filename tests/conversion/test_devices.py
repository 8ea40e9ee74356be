"""A conversion computes where it was told to: nothing is left to PyTorch's default device, no float64 to Apple's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_families import save_family
from tiny_source import convert, write_text

from conversion.methods import METHODS

COMPRESSING = [name for name in METHODS if name != "exact"]


@pytest.fixture
def meta() -> Iterator[None]:
    """Whatever is made without a device has no values, and fails where it meets what has."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def prepared(folder: Path, family: str) -> tuple[Path, Path]:
    return save_family(folder / "source", family, dtype=torch.float32), write_text(folder / "text.txt")


@pytest.mark.parametrize(("method", "cache"), [*((method, "60%") for method in METHODS), ("attention_aware", "40%")])
def test_nothing_is_made_on_the_default_device(
    method: str, cache: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, text = prepared(tmp_path, "llama")
    recipe = {"method": method, "device": "cpu"}
    if method != "exact":
        recipe |= {"cache": cache, "calibration": str(text), "tokens": 256}
    expected = convert(source, tmp_path / "expected", **recipe).output
    request.getfixturevalue("meta")
    found = convert(source, tmp_path / "found", **recipe).output
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
