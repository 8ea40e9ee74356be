"""`mla verify` on a damaged checkpoint: one clear line for every kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_source import convert, save_source, write_text
from typer.testing import CliRunner

from conversion.cli import app

TENSOR = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``source``, ``text.txt`` and a sharded ``converted``."""
    folder = tmp_path_factory.mktemp("damaged")
    source = save_source(folder / "source", dtype=torch.float32)
    write_text(folder / "text.txt", length=200)
    convert(source, folder / "converted", method="exact", shard_size="100KB")
    return folder


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "converted", tmp_path / "damaged"))


def refusal(damaged: Path, folder: Path) -> str:
    command = ["verify", damaged, "--against", folder / "source", "--text", folder / "text.txt", "--windows", "1"]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    (line,) = result.stderr.strip().splitlines()
    assert result.exit_code in (2, 3), line
    assert line.startswith("error: ")
    return line


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value", "fragment"),
    [
        ("dtype", 1, "config"),
        ("kv_lora_rank", "x", "kv_lora_rank"),
        ("kv_lora_rank", 5, "but its configuration means"),
        ("num_hidden_layers", 2, "num_hidden_layers of"),
        ("num_hidden_layers", 10, "num_hidden_layers of"),
        ("hidden_act", "nonsense", "config"),
        ("vocab_size", 300, "vocab_size of"),
        ("intermediate_size", 10**12, "it must be 1 to 2147483647"),
        ("model_type", "llama", "is a llama model without a latent cache"),
    ],
)
def test_configuration(damaged: Path, folder: Path, field: str, value: object, fragment: str) -> None:
    edit(damaged / "config.json", lambda config: config.update({field: value}))
    assert fragment in refusal(damaged, folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("metadata"),
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=None),
        lambda index: index["weight_map"].update({TENSOR: 5}),
        lambda index: index["weight_map"].update({TENSOR: "/etc/passwd"}),
        lambda index: index["weight_map"].update({TENSOR: "absent.safetensors"}),
    ],
    ids=["no metadata", "no map", "null map", "number", "absolute path", "absent shard"],
)
def test_index(damaged: Path, folder: Path, change: Callable[[dict], object]) -> None:
    edit(damaged / "model.safetensors.index.json", change)
    assert str(damaged) in refusal(damaged, folder) or "/etc" in refusal(damaged, folder)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "F8_E4M3"),
        (lambda tensor: tensor.to(torch.int64), "I64"),
        (lambda tensor: tensor.bool(), "BOOL"),
        (lambda tensor: tensor.to(torch.complex64), "C64"),
        (lambda tensor: tensor[:-1].clone(), "(63, 64), but its configuration means (64, 64)"),
        (lambda tensor: tensor.flatten(), "(4096,), but its configuration means (64, 64)"),
        (lambda tensor: tensor.new_ones(()), "(), but its configuration means (64, 64)"),
        (lambda tensor: tensor * float("nan"), "is not finite"),
        (lambda tensor: tensor * 1e36, "differ by nan"),
    ],
    ids=["fp8", "integers", "bools", "complex", "cut", "flat", "scalar", "nan", "huge"],
)
def test_tensor(damaged: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor], fragment: str) -> None:
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    file = damaged / index["weight_map"][TENSOR]
    tensors = load_file(file)
    save_file(tensors | {TENSOR: change(tensors[TENSOR])}, file, metadata={"format": "pt"})
    assert fragment in refusal(damaged, folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (file, content)
        for file in ("config.json", "model.safetensors.index.json")
        for content in (b"", b"{", b"null", b"[]", b"\xff\xfe{\x00}\x00")
    ]
    # Transformers does without one that is no JSON.
    + [("generation_config.json", content) for content in (b"null", b"[]")],
)
def test_file(damaged: Path, folder: Path, file: str, content: bytes) -> None:
    (damaged / file).write_bytes(content)
    assert str(damaged) in refusal(damaged, folder)


def test_shard(damaged: Path, folder: Path) -> None:
    shard = sorted(damaged.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert shard.name in refusal(damaged, folder)
    shard.unlink()
    assert shard.name in refusal(damaged, folder)
