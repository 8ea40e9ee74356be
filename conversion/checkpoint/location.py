"""Where a model is: a folder, one GGUF file, or a repository of the Hub."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import SourceError, first_line

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
_WEIGHT_FILES = ["*.safetensors"]


@dataclass(frozen=True)
class Location:
    """A model that is on this machine, at least its configuration.

    ``model`` is what the user wrote; ``revision`` the commit of a Hub repository; ``gguf_file`` the name of the file
    in ``folder`` where the model is a GGUF.
    """

    model: str
    folder: Path
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """For others to read: the Hub id, or the name of the folder or file without the path on this machine."""
        if self.revision is not None:
            return self.model.partition("@")[0]
        return self.gguf_file or self.folder.resolve().name

    @property
    def arguments(self) -> dict[str, Any]:
        """For the ``from_pretrained`` of any class of Transformers."""
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": str(self.folder)}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def config(self) -> PreTrainedConfig:
        """The model's configuration. Raises `SourceError` where Transformers cannot read it, or does not know it."""
        try:
            return AutoConfig.from_pretrained(**self.arguments, trust_remote_code=False)
        except Exception as error:
            # Transformers and its parsers raise many kinds; every one means that this is no readable model.
            raise SourceError(f"the configuration of {self.model} cannot be read: {first_line(error)}") from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises `SourceError` where there is none."""
        try:
            return AutoTokenizer.from_pretrained(**self.arguments, trust_remote_code=False)
        except Exception as error:
            raise SourceError(f"{self.model} has no tokenizer that can be read: {first_line(error)}") from error

    def generation_config(self, config: PreTrainedConfig) -> GenerationConfig:
        """The model's generation defaults, or those that its configuration implies."""
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder)
        return GenerationConfig.from_model_config(config)

    def fingerprint(self) -> str:
        """Changes when a weight or configuration file changes (name, size or time of change)."""
        if self.revision is not None:
            return self.revision
        files = [self.folder / self.gguf_file] if self.gguf_file else sorted(self.folder.glob("*.*"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def locate(model: str, *, weights: bool = True) -> Location:
    """Finds ``model``.

    Args:
        model: a folder, a ``.gguf`` file, a folder with exactly one of those, or a Hub id (``name[@revision]``).
        weights: also fetch the weights of a Hub id.

    Raises:
        SourceError: nothing of the kind is there.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(f"{model} is a file of type {path.suffix!r}; give a folder, a .gguf file or a Hub id.")
        return Location(model, path.parent, gguf_file=path.name)
    if path.is_dir():
        return _in_folder(model, path)
    if not _HUB_ID.fullmatch(model):
        raise SourceError(f"{model} does not exist; give a folder, a .gguf file or a Hub id.")
    name, _, revision = model.partition("@")
    patterns = _SMALL_FILES + (_WEIGHT_FILES if weights else [])
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        # The Hub client raises its own, the network library's and the system's exceptions.
        raise SourceError(
            f"{model} is neither a folder nor a .gguf file here, and the Hub does not give it ({first_line(error)}); "
            "check the name and the network."
        ) from error
    return Location(model, folder, revision=folder.name)


def _in_folder(model: str, folder: Path) -> Location:
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() and (not files or any(folder.glob("*.safetensors*"))):
        return Location(model, folder)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise SourceError(f"{model} holds {len(files)} GGUF files ({names}); name one of them.")
    if not files:
        raise SourceError(f"{model} holds neither config.json nor a .gguf file; give the folder of a checkpoint.")
    return Location(model, folder, gguf_file=files[0].name)
