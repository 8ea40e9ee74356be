"""A checkpoint's files are those that Transformers loads, all of them in its folder; where that is unclear, none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import assert_refused, edit_json, mla
from safetensors.torch import load_file, save_file
from tiny_source import save_source, tiny_llama
from transformers import AutoModelForCausalLM

from conversion.errors import SourceError
from conversion.sources import open_source

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_source(tmp_path / "source", dtype=torch.float32, max_shard_size="100KB")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_source(tmp_path / "source", dtype=torch.float32)


def other_weights() -> dict[str, torch.Tensor]:
    """Those of another model of the same shape."""
    return {name: 2 * tensor for name, tensor in tiny_llama().state_dict().items() if name != "lm_head.weight"}


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def weight_map(source: Path) -> dict[str, str]:
    return json.loads((source / INDEX).read_text())["weight_map"]


def assert_read_as_transformers_does(source: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    opened = open_source(str(source))
    for name in opened.stored_names():
        assert torch.equal(opened.tensors.tensor(name), expected[name]), name


def assert_convert_refuses(source: Path, *fragments: str) -> None:
    output = source.parent / "results" / "out"
    output.parent.mkdir()
    assert_refused(mla("convert", source, output, "--method", "exact"), *fragments)
    assert list(output.parent.iterdir()) == []


def test_old_weights_beside_shards_are_ambiguous(sharded: Path) -> None:
    save(other_weights(), sharded / "model.safetensors")
    assert_convert_refuses(sharded, "model.safetensors", INDEX, "move one")


def test_file_that_the_configuration_names(single: Path) -> None:
    save(other_weights(), single / "other.safetensors")
    edit_json(single / "config.json", transformers_weights="other.safetensors")
    assert_read_as_transformers_does(single)
    assert torch.equal(
        open_source(str(single)).tensors.tensor("model.norm.weight"), other_weights()["model.norm.weight"]
    )
    edit_json(single / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(SourceError, match=r"transformers_weights.*'pytorch_model.bin'"):
        _ = open_source(str(single)).tensors
    edit_json(single / "config.json", transformers_weights="../other.safetensors")
    with pytest.raises(SourceError, match="not in it"):
        _ = open_source(str(single)).tensors


def test_index_that_the_configuration_names(sharded: Path) -> None:
    save(other_weights(), sharded / "model.safetensors")
    (sharded / INDEX).rename(sharded / "mine.safetensors.index.json")
    edit_json(sharded / "config.json", transformers_weights="mine.safetensors.index.json")
    assert_read_as_transformers_does(sharded)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_in_the_folder(name: str, single: Path) -> None:
    (single / name).write_text("{}")
    assert_convert_refuses(single, "adapter", name, "merge")


def test_distributed_checkpoint_and_pickles(single: Path) -> None:
    (single / ".metadata").write_bytes(b"")
    with pytest.raises(SourceError, match="distributed checkpoint"):
        _ = open_source(str(single)).tensors
    (single / ".metadata").unlink()
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model.bin.*pickles run code"):
        _ = open_source(str(single)).tensors


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "absolute", "a/../../outside.safetensors", "a\0b.safetensors"]
)
def test_index_that_leads_out_of_the_folder(place: str, sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    names = weight_map(sharded)
    shard = next(iter(names.values()))
    (sharded / shard).rename(outside)
    place = str(outside) if place == "absolute" else place
    edit_json(sharded / INDEX, weight_map={name: place if file == shard else file for name, file in names.items()})
    assert_convert_refuses(sharded, "only files in the folder")


def test_link_out_of_the_folder(single: Path) -> None:
    weights = single / "model.safetensors"
    weights.rename(single.parent / "outside.safetensors")
    weights.symlink_to("../outside.safetensors")
    assert_convert_refuses(single, "model.safetensors", "link out of the folder", "copy")


def test_folder_that_is_a_link_out_of_the_folder(sharded: Path) -> None:
    names = weight_map(sharded)
    outside = sharded.parent / "outside"
    outside.mkdir()
    for file in set(names.values()):
        (sharded / file).rename(outside / file)
    (sharded / "weights").symlink_to(outside)
    edit_json(sharded / INDEX, weight_map={name: f"weights/{file}" for name, file in names.items()})
    assert_convert_refuses(sharded, "link out of the folder")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_small_file_that_is_a_link_out_of_the_folder_or_to_nothing(file: str, single: Path) -> None:
    path = single / file
    path.rename(single.parent / file)
    path.symlink_to(f"../{file}")
    with pytest.raises(SourceError, match=f"{file} is a link out of the folder"):
        open_source(str(single))
    (single.parent / file).unlink()
    assert_convert_refuses(single, file, f"link to ../{file}", "does not exist")


def test_tokenizer_files_elsewhere(single: Path) -> None:
    shutil.copy(single / "tokenizer.json", single.parent / "tokenizer.4.0.0.json")
    edit_json(single / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    assert_convert_refuses(single, "fast_tokenizer_files", "../tokenizer.4.0.0.json")


def test_links_within_the_folder_and_of_the_hubs_cache_are_followed(single: Path, tmp_path: Path) -> None:
    weights = single / "model.safetensors"
    weights.rename(single / "weights.safetensors")
    weights.symlink_to("weights.safetensors")
    assert_read_as_transformers_does(single)
    weights.unlink()
    (single / "weights.safetensors").rename(weights)

    repository = tmp_path / "hub" / "models--some--model"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    store = tmp_path / "store"
    store.mkdir()
    for number, file in enumerate(sorted(single.iterdir())):
        # The client may share blobs between caches: they are links themselves.
        file.rename(store / str(number))
        (blobs / str(number)).symlink_to(store / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_read_as_transformers_does(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(store / "2")
    with pytest.raises(SourceError, match="link out of the folder"):
        _ = open_source(str(snapshot)).tensors


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"metadata": ...}, ("metadata", "add")),
        ({"weight_map": ...}, ("weight_map",)),
        ({"weight_map": {}}, ("weight_map",)),
        ({"weight_map": [["model.norm.weight", "a"]]}, ("weight_map",)),
        ({"weight_map": {"model.norm.weight": 5}}, ("names 5", "model.norm.weight")),
        ({"weight_map": {"model.norm.weight": None}}, ("names None",)),
        ({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}, ("'pytorch_model.bin'", ".safetensors")),
    ],
    ids=["no metadata", "no map", "empty map", "list", "number", "null", "pickle"],
)
def test_index_that_transformers_would_not_read(fields: dict, fragments: tuple[str, ...], sharded: Path) -> None:
    edit_json(sharded / INDEX, **fields)
    assert_convert_refuses(sharded, INDEX, *fragments)


def test_tensor_that_two_shards_hold_is_that_of_the_last(sharded: Path) -> None:
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(first)
    name = next(iter(tensors))
    save(load_file(last) | {name: 2 * tensors[name]}, last)
    assert_read_as_transformers_does(sharded)
