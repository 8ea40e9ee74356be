"""From the Hub come the small files first, then the weights that Transformers would load, and nothing else."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest
import torch
from commands import edit_json
from tiny_source import save_source

from conversion.errors import SourceError
from conversion.sources import open_source

COMMIT = "0123abcd"
NEVER = ("consolidated.safetensors", "pytorch_model.bin", "modeling_evil.py")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the Hub has; it gives copies, as many as it is asked for, to ``COMMIT`` beside it."""
    repository, snapshot = tmp_path / "repository", tmp_path / COMMIT

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "some/model"
        assert revision in ("main", COMMIT)
        snapshot.mkdir(exist_ok=True)
        for file in repository.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr("conversion.checkpoint.location.snapshot_download", download)
    return repository


def fill(repository: Path, **options: str) -> None:
    save_source(repository, dtype=torch.float32, **options)
    for name in NEVER:
        (repository / name).write_bytes(b"")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}], ids=["one file", "shards"])
def test_weights_are_fetched_by_name_and_revision(options: dict[str, str], repository: Path) -> None:
    fill(repository, **options)
    source = open_source("some/model@main")
    assert source.location.name == "some/model"
    assert source.location.revision == COMMIT
    assert not list(source.location.folder.glob("*.safetensors"))
    assert source.stored_names()
    fetched = {file.name for file in source.location.folder.iterdir()}
    assert fetched == {file.name for file in repository.iterdir()} - set(NEVER)


def test_weights_that_the_configuration_names_are_fetched(repository: Path) -> None:
    fill(repository)
    shutil.copy(repository / "model.safetensors", repository / "other.safetensors")
    edit_json(repository / "config.json", transformers_weights="other.safetensors")
    source = open_source("some/model@main")
    assert source.stored_names()
    assert {file.name for file in source.location.folder.glob("*.safetensors")} == {"other.safetensors"}


def test_repository_with_two_sets_of_weights_is_refused(repository: Path) -> None:
    fill(repository, max_shard_size="100KB")
    shutil.copy(next(repository.glob("model-*.safetensors")), repository / "model.safetensors")
    with pytest.raises(SourceError, match="move one of the two away"):
        _ = open_source("some/model@main").tensors


def test_repository_without_a_configuration_is_refused(repository: Path) -> None:
    repository.mkdir()
    (repository / "README.txt").write_text("no model")
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        open_source("some/model@main")
