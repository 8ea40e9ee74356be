"""``mla push``, against a Hub on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import assert_refused, mla
from fake_hub import TOKEN, FakeHub

NAME = "me/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    server = hub.server()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "chat").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "chat" / "template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text('pipeline("text-generation", "PATH_OR_ID")\n')
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("hidden")
    return folder


def test_everything_goes_up_in_one_commit(hub: FakeHub, checkpoint: Path) -> None:
    result = mla("push", checkpoint, NAME, "--private")
    assert result.exit_code == 0, result.output
    assert f"{NAME} is ready: {hub.address}/{NAME}/commit/1" in result.output
    files = hub.repositories[NAME]
    assert files.keys() == {".gitattributes", "config.json", "model.safetensors", "chat/template.jinja", "README.md"}
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    # The card says where the model now is; the one on disk is as it was.
    assert files["README.md"] == b'pipeline("text-generation", "me/tiny")\n'
    assert "PATH_OR_ID" in (checkpoint / "README.md").read_text()
    assert (hub.private[NAME], hub.commits) == (True, 1)


def test_a_dry_run_lists_and_asks_nothing(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = mla("push", checkpoint, NAME, "--dry-run")
    assert result.exit_code == 0, result.output
    for told in ("me/tiny, public", "model.safetensors", "7.0 kB", "4 files", "nothing was uploaded"):
        assert told in result.output
    assert "secret" not in result.output
    assert hub.asked == []


def test_files_that_are_there_are_replaced_only_with_consent(hub: FakeHub, checkpoint: Path) -> None:
    hub.repositories[NAME], hub.private[NAME] = {".gitattributes": b"", "config.json": b"old", "other": b"kept"}, False
    assert_refused(mla("push", checkpoint, NAME), "holds 2 files already", "--yes")
    assert hub.repositories[NAME]["config.json"] == b"old"
    assert mla("push", checkpoint, NAME, "--yes").exit_code == 0
    assert hub.repositories[NAME]["config.json"] == b"{}"
    assert hub.repositories[NAME]["other"] == b"kept"


def test_an_empty_repository_is_filled_without_asking(hub: FakeHub, checkpoint: Path) -> None:
    hub.repositories[NAME], hub.private[NAME] = {".gitattributes": b""}, False
    assert mla("push", checkpoint, NAME).exit_code == 0
    assert "POST /api/repos/create" not in hub.asked


def test_what_is_public_does_not_pass_for_private(hub: FakeHub, checkpoint: Path) -> None:
    hub.repositories[NAME], hub.private[NAME] = {}, False
    assert_refused(mla("push", checkpoint, NAME, "--private"), "is there and public")
    assert hub.commits == 0


def test_without_a_token_nothing_is_asked(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert_refused(mla("push", checkpoint, NAME), "there is no token", "hf auth login")
    assert hub.asked == []


def test_what_the_hub_refuses_is_told(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert_refused(mla("push", checkpoint, NAME), "the Hub did not take me/tiny", "Invalid username or password")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("repository", "fragment"),
    [("tiny", "names no owner; give OWNER/tiny"), ("a/b/c", "is no name of a repository"), ("me/..", "is no name of")],
)
def test_names_are_checked_before_anything_is_asked(
    hub: FakeHub, checkpoint: Path, repository: str, fragment: str
) -> None:
    assert_refused(mla("push", checkpoint, repository), fragment)
    assert hub.asked == []


def test_a_folder_without_a_model_and_links_out_of_it_are_refused(hub: FakeHub, checkpoint: Path) -> None:
    assert_refused(mla("push", checkpoint / "chat", NAME), "neither config.json nor a .gguf file")
    assert_refused(mla("push", checkpoint / "absent", NAME), "neither config.json nor a .gguf file")
    outside = checkpoint.parent / "key"
    outside.write_text("private")
    (checkpoint / "key").symlink_to(outside)
    assert_refused(mla("push", checkpoint, NAME), "is a link out of the folder")
    assert hub.asked == []
