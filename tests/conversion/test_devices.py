"""A conversion computes where it was told to: nothing is left to PyTorch's default device, no float64 to Apple's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, mla
from healing_runs import small_default
from safetensors.torch import load_file
from tiny_families import save_family
from tiny_source import convert, save_source, write_text

from conversion.devices.choice import CPU, chosen_device
from conversion.devices.running_sums import RunningSums
from conversion.errors import ConversionError
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


def same_weights(folder: Path, other: Path) -> bool:
    return (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "method", "more"),
    [
        *(("llama", method, {}) for method in METHODS),
        *((family, "attention_aware", {}) for family in ("gemma3_text", "gpt_oss", "phi3")),
        ("cohere-norms", "attention_aware", {"latent_bits": 4}),
    ],
)
def test_nothing_is_made_on_the_default_device(
    family: str, method: str, more: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, text = prepared(tmp_path, family)
    recipe = {"method": method, "device": "cpu"} | more
    if method != "exact":
        recipe |= {"cache": "60%", "calibration": str(text), "tokens": 256}
    expected = convert(source, tmp_path / "expected", **recipe).output
    request.getfixturevalue("meta")
    assert same_weights(convert(source, tmp_path / "found", **recipe).output, expected)


def test_what_the_source_writes_is_not_either(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, _ = prepared(tmp_path, "llama")
    recipe = {"cache": "60%", "calibration": "self", "tokens": 256}
    expected = convert(source, tmp_path / "expected", **recipe).output
    request.getfixturevalue("meta")
    assert same_weights(convert(source, tmp_path / "found", **recipe).output, expected)


@pytest.mark.parametrize("lora", [(), ("--lora", 2)])
@small_default()
def test_what_heals_and_verifies_is_not_either(lora: tuple, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = save_source(tmp_path / "source", torch.float32, max_position_embeddings=256)
    text = write_text(tmp_path / "text.txt")
    model = convert(source, tmp_path / "model", cache="60%", calibration=str(text), tokens=256).output
    options = ("--teacher", source, "--data", text, "--steps", 2, *lora)
    healed = mla("heal", model, *options, "--out", tmp_path / "expected")
    assert healed.exit_code == 0, healed.output
    request.getfixturevalue("meta")
    healed = mla("heal", model, *options, "--out", tmp_path / "found", "--device", "cpu")
    assert healed.exit_code == 0, healed.output
    assert same_weights(tmp_path / "found", tmp_path / "expected")
    verified = mla("verify", tmp_path / "found", "--against", source, "--text", text, "--recall", "--device", "cpu")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "gpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """By every command, with what is there; nothing is read before."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {tmp_path}\noutput: {tmp_path / 'out'}\ndevice: '{name}'\n", encoding="utf-8")
    for command in (
        ("convert", tmp_path, tmp_path / "out", "--device", name),
        ("plan", tmp_path, "--device", name),
        ("run", recipe),
        ("verify", tmp_path, "--against", tmp_path, "--device", name),
        ("heal", tmp_path, "--teacher", "x", "--data", "x", "--steps", 1, "--out", tmp_path / "out", "--device", name),
    ):
        assert_refused(mla(*command), f"there is no device {name!r}", "only cpu", "auto")


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums as on a device without float64."""
    for place in ("choice", "running_sums"):
        monkeypatch.setattr(f"conversion.devices.{place}.has_float64", lambda device: False)


@pytest.mark.parametrize("count", [100, 10_000])
def test_sums_without_float64_lose_nothing_to_the_number_of_terms(count: int, without_float64: None) -> None:
    """Float32 alone would lose a digit every hundred terms; here the error is that of the second number."""
    draw = torch.Generator().manual_seed(0)
    terms = torch.randn(count, 64, generator=draw) * torch.logspace(-6, 6, 64)
    sums = RunningSums(CPU, total=(64,))
    for term in terms:
        sums.add("total", term)
    found, expected = sums.tensors()["total"], terms.double().sum(0)
    scale = terms.double().abs().sum(0)
    assert found.dtype == torch.float64
    assert ((found - expected).abs() / scale).max() < 1e-13
    alone = torch.zeros(64)
    for term in terms:
        alone += term
    assert ((alone.double() - expected).abs() / scale).max() > 1e-9


@pytest.mark.parametrize("method", COMPRESSING)
def test_a_conversion_without_float64_is_the_same_but_for_rounding(
    method: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, text = prepared(tmp_path, "llama")
    recipe = {"method": method, "cache": "60%", "calibration": str(text), "tokens": 256}
    expected = load_file(convert(source, tmp_path / "expected", **recipe).output / "model.safetensors")
    request.getfixturevalue("without_float64")
    found = load_file(convert(source, tmp_path / "found", **recipe).output / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch counts them; nothing is computed on them."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [str(chosen_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]
    with pytest.raises(ConversionError, match="no device 'cuda:2', only cpu, cuda:0, cuda:1"):
        chosen_device("cuda:2")
    with pytest.raises(ConversionError, match="no device 'mps'"):
        chosen_device("mps")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert str(chosen_device("cuda")) == "cuda:0"
    for count, name in (("2", "cuda:1"), ("3", "cuda")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        with pytest.raises(ConversionError, match=f"{count} processes would share {name}, and 2 are there"):
            chosen_device(name)


def test_freed_memory_is_kept_and_given_back() -> None:
    """In a process of its own: what a page is faulted in for the second time is what counts."""
    code = """
import platform, resource, torch
from conversion.devices.freed_memory import keeping_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with keeping_freed_memory():
    faults()
    within = faults()
after = faults()
assert platform.libc_ver()[0] != "glibc" or (within * 10 < outside and within * 10 < after), (outside, within, after)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("THP_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
