"""A finished checkpoint on its way to the Hub: first what would go there, then all of it in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.progress import Progress

from ..errors import ConversionError, OutputError, SourceError, first_line
from ..progress import counting
from .paths import inside

CARD = "README.md"
PLACEHOLDER = "PATH_OR_ID"
"""In a card, until its model has a name of its own."""
_OF_THE_HUB = {".gitattributes"}
_MESSAGE = "Upload by mla push"


@dataclass(frozen=True)
class Upload:
    """What would go where: ``files`` are names below ``folder`` and their sizes in bytes."""

    folder: Path
    repository: str
    private: bool
    files: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def planned_upload(folder: Path, repository: str, *, private: bool) -> Upload:
    """Lists what `upload` would send; nothing is asked of the Hub.

    Args:
        folder: of a checkpoint, converted, healed or exported.
        repository: ``OWNER/NAME``.
        private: whether a new repository is visible to its owner alone.

    Raises:
        SourceError: the folder holds no model, or a link out of it.
        OutputError: the Hub admits no repository of this name.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OutputError(f"{repository} is no name of a repository ({first_line(error)}); give OWNER/NAME.") from error
    if "/" not in repository:
        raise OutputError(f"{repository} names no owner; give OWNER/{repository}.")
    files = sorted(file for file in folder.rglob("*") if _is_visible(file.relative_to(folder)) and file.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    if "config.json" not in names and not any(name.endswith(".gguf") for name in names):
        raise SourceError(f"{folder} holds neither config.json nor a .gguf file; give the folder of a finished model.")
    return Upload(folder, repository, private, {name: inside(folder, name).stat().st_size for name in names})


def _is_visible(name: Path) -> bool:
    return not any(part.startswith(".") for part in name.parts)


def upload(planned: Upload, progress: Progress, *, consent: bool) -> str:
    """Creates the repository where there is none, and sends all files in one commit.

    Args:
        planned: by `planned_upload`.
        progress: counts bytes.
        consent: to a repository that holds files: those of the same name are replaced, none is deleted.

    Returns:
        The address of the commit.

    Raises:
        OutputError: there is no token; the repository holds files, and ``consent`` is False; it is public, and was
            asked for as private; the Hub refuses, or is not reached.
    """
    if get_token() is None:
        raise OutputError(
            "the Hub wants to know who writes, and there is no token; run hf auth login, or set HF_TOKEN."
        )
    api, name, operations = HfApi(), planned.repository, []
    with _refused_by_hub(name):
        _make_repository(api, planned, consent)
        with counting(progress, "uploading", planned.nbytes) as sent:
            for file, size in planned.files.items():
                operation = CommitOperationAdd(file, _content(planned, file, name))
                api.preupload_lfs_files(name, [operation])
                operations.append(operation)
                sent(size)
        return api.create_commit(name, operations, commit_message=_MESSAGE).commit_url


def _make_repository(api: HfApi, planned: Upload, consent: bool) -> None:
    name = planned.repository
    try:
        known = api.model_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=planned.private)
        return
    if planned.private and not known.private:
        raise OutputError(f"{name} is there and public; make it private in its settings first, or leave out --private.")
    held = {file.rfilename for file in known.siblings or ()} - _OF_THE_HUB
    if held and not consent:
        raise OutputError(
            f"{name} holds {len(held)} files already; --yes replaces those of the same name, or give another name."
        )


def _content(planned: Upload, file: str, name: str) -> str | bytes:
    """A path, or the bytes of the card, which from here on says where its model is."""
    path = planned.folder / file
    return path.read_bytes().replace(PLACEHOLDER.encode(), name.encode()) if file == CARD else str(path)


@contextmanager
def _refused_by_hub(name: str) -> Iterator[None]:
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        # The Hub client raises its own, the network library's and the system's exceptions.
        said = getattr(error, "server_message", None) or first_line(error)
        raise OutputError(
            f"the Hub did not take {name} ({said}); check the network, the token, and who owns the name."
        ) from error
