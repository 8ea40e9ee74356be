"""Bytes that pass through a conversion: any type, a piece in memory at a time, in shards as large as was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from safetensors.torch import load_file, save_file
from tiny_source import convert, save_source, tiny_llama, write_text

from conversion.checkpoint import reader, writer
from conversion.checkpoint.reader import SafetensorsReader
from conversion.checkpoint.writer import ShardWriter
from conversion.errors import ConversionError, SourceError, VerificationError
from conversion.evaluation.reference import check_reference
from conversion.recipe import make_recipe
from conversion.sources import open_source

NARROW = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
ATTENTION = "model.layers.1.self_attn.k_proj.weight"


def of_every_type() -> dict[str, torch.Tensor]:
    """Values that a detour through another type would change, and shapes without any."""
    torch.manual_seed(0)
    drawn = torch.randint(0, 256, (4, 24), dtype=torch.uint8)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {f"{dtype}": torch.randn(3, 8).to(dtype) for dtype in floats}
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint32, torch.uint64)
    tensors |= {f"{dtype}": drawn.view(dtype).clone() for dtype in whole}
    largest = torch.tensor([2**62 + 1, -(2**62) - 1])
    return tensors | {"bool": drawn > 9, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 7), "largest": largest}


def write_all(folder: Path, tensors: dict[str, torch.Tensor], shard_size: str = "5GB") -> ShardWriter:
    made = ShardWriter(folder, {name: tensor.to("meta") for name, tensor in tensors.items()}, shard_size)
    for file in made.files:
        made.write(file, lambda name: tensors[name].flatten().split(5))
    made.write_index()
    return made


def test_a_shard_has_the_bytes_of_the_library(tmp_path: Path) -> None:
    tensors = of_every_type()
    write_all(tmp_path, tensors)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_file_is_read_by_pieces_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE", 5)
    tensors = of_every_type()
    save_file(tensors, tmp_path / "model.safetensors")
    opened = SafetensorsReader(tmp_path)
    for name, tensor in tensors.items():
        pieces = list(opened.pieces(name))
        assert all(piece.numel() <= 5 for piece in pieces)
        together = torch.cat(pieces) if pieces else tensor.flatten()
        assert torch.equal(together.view(torch.uint8), tensor.flatten().view(torch.uint8)), name
        assert torch.equal(
            opened.tensor(name).view(tensor.shape).view(-1).view(torch.uint8), together.view(torch.uint8)
        )
    table, indices = tensors["torch.float32"], torch.tensor([[2, 0], [2, 2]])
    assert torch.equal(opened.rows("torch.float32", indices), table[indices])
    for index in (-1, 3):
        with pytest.raises(IndexError, match="has 3 rows"):
            opened.rows("torch.float32", torch.tensor([0, index]))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([torch.ones(3)], "has 3 values or more of torch.float32, not the 4"),
        ([torch.ones(3), torch.ones(3)], "has 6 values"),
        ([torch.ones(4).double()], "torch.float64"),
        ([torch.ones(3), torch.tensor([float("nan")])], "w is not finite"),
    ],
)
def test_what_was_not_planned_is_not_written(pieces: list[torch.Tensor], message: str, tmp_path: Path) -> None:
    made = ShardWriter(tmp_path, {"w": torch.empty(2, 2, device="meta")})
    with pytest.raises(VerificationError, match=message):
        made.write(made.files[0], lambda _: pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_other_bytes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(SafetensorsReader):
        def pieces(self, name):
            for piece in super().pieces(name):
                yield -piece

    monkeypatch.setattr(writer, "SafetensorsReader", Failing)
    with pytest.raises(VerificationError, match=r"w was not read back .*; check the disk"):
        write_all(tmp_path, {"w": torch.ones(4)})


def test_the_index_is_that_of_transformers(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "expected", max_shard_size="50KB")
    stored = SafetensorsReader(tmp_path / "expected")
    (tmp_path / "found").mkdir()
    write_all(
        tmp_path / "found", {name: stored.tensor(name) for name in model.state_dict() if name in stored.names}, "50KB"
    )
    expected, found = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("expected", "found")
    )
    assert found == expected
    for file in set(found["weight_map"].values()):
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A source with a matrix of the MLP in eight bits."""
    source = save_source(tmp_path / "source", dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    save_file(
        tensors | {NARROW: tensors[NARROW].to(torch.float8_e4m3fn)},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    return source


@pytest.mark.parametrize("piece", [2**24, 1000])
def test_what_is_no_attention_keeps_its_bytes(
    piece: int, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PIECE", piece)
    in_memory: dict[str, int] = {}
    sound = writer._sound

    def noting(name, pieces, planned):
        for part in sound(name, pieces, planned):
            in_memory[name] = max(in_memory.get(name, 0), part.numel())
            yield part

    monkeypatch.setattr(writer, "_sound", noting)
    text = write_text(tmp_path / "text.txt")
    output = convert(narrow, tmp_path / "out", cache="75%", tokens=256, calibration=str(text)).output
    before, after = load_file(narrow / "model.safetensors"), load_file(output / "model.safetensors")
    kept = [name for name in before if "self_attn" not in name]
    assert NARROW in kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
        assert in_memory[name] == min(piece, before[name].numel())


def test_a_type_that_is_asked_for_is_written(narrow: Path, tmp_path: Path) -> None:
    output = convert(narrow, tmp_path / "out", method="exact", dtype="bfloat16").output
    before = load_file(narrow / "model.safetensors")[NARROW]
    assert torch.equal(load_file(output / "model.safetensors")[NARROW], before.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "dtype", "named"),
    [(ATTENTION, torch.float8_e4m3fn, "F8_E4M3"), (NARROW, torch.int8, "I8"), (EMBEDDING, torch.bool, "BOOL")],
)
def test_what_cannot_be_passed_on_is_refused(name: str, dtype: torch.dtype, named: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"{name} is stored as {named}"):
        _ = open_source(str(source)).tensors


def test_few_rows_of_the_embedding_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(save_source(tmp_path / "source")))
    ids = torch.tensor([[5, 9, 5]])
    expected = source.tensors.tensor(EMBEDDING)[ids].float()
    monkeypatch.setattr(SafetensorsReader, "tensor", lambda *_: pytest.fail("the whole table was read"))
    assert torch.equal(source.embed(ids), expected)


def test_what_transformers_loads_is_compared_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(save_source(tmp_path / "source", dtype=torch.bfloat16)))
    monkeypatch.setattr(reader, "PIECE", 1000)
    monkeypatch.setattr(SafetensorsReader, "tensor", lambda *_: pytest.fail("a whole tensor was read"))
    check_reference(source)


@pytest.mark.parametrize("size", ["5", "0GB", "0.0MB", "-1GB", "5 gigabytes", "GB", "1e3GB"])
def test_a_size_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=f"shard_size is '{size}': write a size"):
        make_recipe(source="source", output="out", shard_size=size)
    source = save_source(tmp_path / "source")
    assert_refused(mla("convert", source, tmp_path / "out", f"--shard-size={size}"), "shard_size", size)
