"""Mutations of weights: of safetensors files, their bytes, headers and tensors, of their index, and of GGUF files.

A mutation changes the checkpoint in a folder, and says how. ``outside`` is a folder beside it, see `fuzz_sources`.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file

Mutation = Callable[[random.Random, Path, Path], str]

INDEX = "model.safetensors.index.json"
STRANGE: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 258, 2**31, 2**63, 2**64, 1.5, 1e308, float("nan"), float("inf"), "", "x", "64", "auto", None,
    True, False, [], {}, [1, 2], ["x"], [None], {"x": 1}, "x" * 5000, "a\0b", "\ud800",
)  # fmt: skip
_VALUES = (float("nan"), float("inf"), 3e38, -3e38, 1e30, 1e-40, 0.0)
_DTYPES = (torch.int32, torch.int8, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64)
_FILES = (
    "model.safetensors", INDEX, "pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors", ".metadata",
    "consolidated.safetensors", "model.safetensors.bak", "model.gguf", "modeling_evil.py",
)  # fmt: skip
_MORE = ("model.layers.0.self_attn.k_norm.weight", "score.weight", "extra", "model.layers.9.mlp.up_proj.weight", "")


def weight_mutations(source: Path) -> list[Mutation]:
    """Those that fit the kind of checkpoint."""
    if any(source.glob("*.gguf")):
        return [bytes_changed, truncated, grown, gguf_field_changed, gguf_tensor_changed]
    index = [index_entry_changed, index_field_changed, index_text_changed] * 2 if (source / INDEX).is_file() else []
    tensors = [tensor_values_set, tensor_retyped, tensor_reshaped, tensor_dropped, tensor_added, tensors_swapped]
    files = [bytes_changed, truncated, grown, header_changed, file_replaced, file_added]
    return files + tensors + index


def _weights(draw: random.Random, source: Path) -> Path:
    return draw.choice(sorted(file for file in source.iterdir() if file.suffix in (".safetensors", ".gguf")))


def bytes_changed(draw: random.Random, source: Path, outside: Path) -> str:
    file = _weights(draw, source)
    content = bytearray(file.read_bytes())
    # Half of the time where the structure is.
    end = min(len(content), 4096) if draw.random() < 0.5 else len(content)
    places = [draw.randrange(end) for _ in range(draw.choice((1, 1, 2, 8, 64)))]
    for place in places:
        content[place] = draw.randrange(256)
    file.write_bytes(content)
    return f"bytes {places[:4]} of {file.name}"


def truncated(draw: random.Random, source: Path, outside: Path) -> str:
    file = _weights(draw, source)
    content = file.read_bytes()
    size = draw.choice((0, 4, 8, 100, len(content) - 1, draw.randrange(len(content))))
    file.write_bytes(content[:size])
    return f"{file.name} cut to {size} bytes"


def grown(draw: random.Random, source: Path, outside: Path) -> str:
    file = _weights(draw, source)
    more = draw.choice((1, 8, 1000))
    with open(file, "ab") as opened:
        opened.write(bytes(more))
    return f"{file.name} grown by {more} bytes"


def header_changed(draw: random.Random, source: Path, outside: Path) -> str:
    """The header of a safetensors file: sizes, types, places and names that its data does not have."""
    file = _weights(draw, source)
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    what = draw.choice(("dtype", "shape", "data_offsets", "name", "length", "metadata"))
    if what == "dtype":
        header[name]["dtype"] = draw.choice(("I64", "I32", "U8", "F8_E4M3", "BF16", "F16", "F64", "C64", "X", 5))
    elif what == "shape":
        header[name]["shape"] = draw.choice(([], [0], [-1], header[name]["shape"][::-1], [2**40, 2**40], ["x"], None))
    elif what == "data_offsets":
        header[name]["data_offsets"] = draw.choice(([0, 0], [0, 4], [-4, 4], [2**60, 2**61], None))
    elif what == "name":
        header[draw.choice(_MORE) or "x"] = header.pop(name)
    elif what == "metadata":
        header["__metadata__"] = draw.choice((None, {}, {"format": "tf"}, {"format": 5}, "x"))
    encoded = json.dumps(header).encode()
    written = len(encoded) if what != "length" else draw.choice((0, 1, len(encoded) - 1, 2**40, 2**63))
    file.write_bytes(struct.pack("<Q", written) + encoded + content[8 + length :])
    return f"{what} of {name} in the header of {file.name}"


def file_replaced(draw: random.Random, source: Path, outside: Path) -> str:
    file = _weights(draw, source)
    how = draw.choice(("deleted", "link outside", "link to nothing", "link inside", "folder", "other file"))
    kept = file.with_name("kept.bin")
    file.rename(kept)
    if how == "link outside":
        file.symlink_to(draw.choice((f"../{outside.name}/{file.name}", outside.resolve() / file.name)))
    elif how == "link to nothing":
        file.symlink_to("nothing")
    elif how == "link inside":
        file.symlink_to(kept.name)
    elif how == "folder":
        file.mkdir()
    elif how == "other file":
        file.write_bytes((source / "config.json").read_bytes())
    if how != "link inside":
        kept.unlink()
    return f"{file.name}: {how}"


def file_added(draw: random.Random, source: Path, outside: Path) -> str:
    """Files that Transformers may prefer, add or ignore."""
    name = draw.choice(_FILES)
    if (source / name).exists():
        return tensor_values_set(draw, source, outside)
    if name.endswith(".safetensors"):
        donor = sorted(outside.glob("*.safetensors"))[0]
        (source / name).write_bytes(donor.read_bytes())
    elif name.endswith(".json"):
        (source / name).write_text(
            json.dumps({"base_model_name_or_path": "evil", "peft_type": "LORA", "weight_map": {}})
        )
    else:
        (source / name).write_bytes(b"raise SystemExit")
    return f"{name} added"


def _edit(draw: random.Random, source: Path, edit: Callable[[dict[str, torch.Tensor], str], str | None]) -> str:
    file = _weights(draw, source)
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    said = edit(tensors, name)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return f"{name} of {file.name}{said or ''}"


def tensor_values_set(draw: random.Random, source: Path, outside: Path) -> str:
    value, whole = draw.choice(_VALUES), draw.random() < 0.3

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        flat = tensors[name].view(-1)
        flat[slice(None) if whole else draw.randrange(len(flat))] = value
        return f" {'all' if whole else 'once'} {value}"

    return _edit(draw, source, edit)


def tensor_retyped(draw: random.Random, source: Path, outside: Path) -> str:
    dtype = draw.choice(_DTYPES)

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        tensors[name] = (10 * tensors[name] if not dtype.is_floating_point else tensors[name]).to(dtype)
        return f" as {dtype}"

    return _edit(draw, source, edit)


def tensor_reshaped(draw: random.Random, source: Path, outside: Path) -> str:
    how = draw.choice(("transposed", "shorter", "narrower", "flat", "with one dimension more", "empty"))

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        tensor = tensors[name]
        tensors[name] = {
            "transposed": tensor.mT if tensor.ndim == 2 else tensor.flip(0),
            "shorter": tensor[:-1],
            "narrower": tensor[..., :-1],
            "flat": tensor.flatten(),
            "with one dimension more": tensor[None],
            "empty": tensor[:0],
        }[how].clone()
        return f" {how}"

    return _edit(draw, source, edit)


def tensor_dropped(draw: random.Random, source: Path, outside: Path) -> str:
    return _edit(draw, source, lambda tensors, name: tensors.pop(name) is None or " dropped")


def tensor_added(draw: random.Random, source: Path, outside: Path) -> str:
    added = draw.choice((*_MORE, "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "{}.scales", "x.{}"))

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        key = added.format(name) or "x"
        tensors[key] = 2 * tensors[name].clone()
        return f" again as {key}"

    return _edit(draw, source, edit)


def tensors_swapped(draw: random.Random, source: Path, outside: Path) -> str:
    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name].clone()
        return f" swapped with {other}"

    return _edit(draw, source, edit)


def index_entry_changed(draw: random.Random, source: Path, outside: Path) -> str:
    index = json.loads((source / INDEX).read_text())
    name = draw.choice(sorted(index["weight_map"]))
    file = index["weight_map"][name]
    elsewhere = (f"../{outside.name}/{file}", str(outside.resolve() / file), f"x/../../{outside.name}/{file}")
    value = draw.choice((*STRANGE, *elsewhere, *elsewhere, *sorted(set(index["weight_map"].values())), ...))
    for key in [key for key, other in index["weight_map"].items() if other == file] if draw.random() < 0.5 else [name]:
        index["weight_map"][key] = value
        if value is ...:
            del index["weight_map"][key]
    (source / INDEX).write_text(json.dumps(index))
    return f"{name} in {str(value)[:60]!r} by the index"


def index_field_changed(draw: random.Random, source: Path, outside: Path) -> str:
    index = json.loads((source / INDEX).read_text())
    field, value = draw.choice(("metadata", "weight_map")), draw.choice((*STRANGE, ...))
    index[field] = value
    if value is ...:
        del index[field]
    (source / INDEX).write_text(json.dumps(index))
    return f"{field} of the index is {str(value)[:60]!r}"


def index_text_changed(draw: random.Random, source: Path, outside: Path) -> str:
    return text_changed(draw, source / INDEX)


def text_changed(draw: random.Random, file: Path) -> str:
    """A text file cut, with other characters, or in another encoding."""
    text = file.read_text(encoding="utf-8")
    how = draw.choice(("cut", "characters", "utf-16", "empty", "list"))
    if how == "characters":
        for _ in range(draw.choice((1, 2, 8))):
            place = draw.randrange(len(text))
            text = text[:place] + draw.choice('{}[]",:0-x\0é') + text[place + 1 :]
    text = {"cut": text[: draw.randrange(len(text))], "empty": "", "list": f"[{text}]"}.get(how, text)
    file.write_text(text, encoding="utf-16" if how == "utf-16" else "utf-8")
    return f"{file.name}: {how}"


def gguf_field_changed(draw: random.Random, source: Path, outside: Path) -> str:
    """A number of the metadata, or an element of its arrays."""
    reader = gguf.GGUFReader(next(source.glob("*.gguf")), "r+")
    name = draw.choice(
        sorted(name for name, field in reader.fields.items() if field.data and not name.startswith("GGUF."))
    )
    field = reader.fields[name]
    part = field.parts[draw.choice(field.data)]
    # Strings are bytes here.
    part[draw.randrange(len(part))] = draw.choice((0, 1, 2, 3, 7, 100, 255))
    return f"a value of {name}"


def gguf_tensor_changed(draw: random.Random, source: Path, outside: Path) -> str:
    """Name, dimensions, type or place of a tensor."""
    reader = gguf.GGUFReader(next(source.glob("*.gguf")), "r+")
    tensor = draw.choice(reader.tensors)
    number = draw.randrange(len(tensor.field.parts))
    part = tensor.field.parts[number]
    part[draw.randrange(len(part))] = draw.choice((0, 1, 2, 3, 8, 14, 24, 100, 255))
    return f"part {number} of the entry of {tensor.name}"
