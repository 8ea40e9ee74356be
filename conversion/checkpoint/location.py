"""Where a model is: a folder, one GGUF file, or a repository of the Hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import SourceError, first_line
from .json_fields import check_config, check_sizes, check_tokenizer_config, passed_on, read_fields
from .paths import did_you_mean, expanded, inside
from .weight_files import INDEX, SINGLE, weight_files

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
_TEMPLATES = "additional_chat_templates"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


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
        """What others may read: the Hub id, or the name of the folder or file without the path on this machine."""
        if self.revision is not None:
            return self.model.partition("@")[0]
        return self.gguf_file or self.folder.resolve().name

    @property
    def arguments(self) -> dict[str, Any]:
        """What the ``from_pretrained`` of any class of Transformers is given."""
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": str(self.folder)}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def config(self) -> PreTrainedConfig:
        """The model's configuration, without what it says about how to run it: other classes and machines do.

        Raises:
            SourceError: Transformers cannot read it, or does not know it.
        """
        if self.gguf_file is None:
            check_config(self.folder / "config.json")
        try:
            config = AutoConfig.from_pretrained(**self.arguments, trust_remote_code=False)
        except Exception as error:
            # Transformers and its parsers raise many kinds; every one means that this is no readable model.
            raise SourceError(f"the configuration of {self.model} cannot be read: {first_line(error)}") from error
        check_sizes(self.model, vars(config))
        config._attn_implementation = None
        config.return_dict = True
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which saves neither code nor places. Raises `SourceError` where there is none."""
        path = self.folder / "tokenizer_config.json"
        if self.gguf_file is None and path.is_file():
            check_tokenizer_config(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(**self.arguments, trust_remote_code=False)
        except Exception as error:
            raise SourceError(f"{self.model} has no tokenizer that can be read: {first_line(error)}") from error
        for field in list(tokenizer.init_kwargs):
            # Transformers leaves out other private fields where it finds this one.
            if field != "name_or_path" and not passed_on(field):
                del tokenizer.init_kwargs[field]
        return tokenizer

    def generation_config(self, config: PreTrainedConfig) -> GenerationConfig:
        """The model's generation defaults, or those that its configuration implies. Raises `SourceError`."""
        path = self.folder / "generation_config.json"
        if not path.is_file():
            return GenerationConfig.from_model_config(config)
        read_fields(path)
        try:
            generation_config = GenerationConfig.from_pretrained(self.folder)
        except Exception as error:
            raise SourceError(f"{path} is no valid generation configuration: {first_line(error)}") from error
        for field in [field for field in vars(generation_config) if not passed_on(field)]:
            delattr(generation_config, field)
        return generation_config

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
        weights: also fetch the weights of a Hub id: the files that Transformers would load.

    Raises:
        SourceError: nothing of the kind is there, or its files lie elsewhere.
    """
    path = expanded(model)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(f"{model} is a file of type {path.suffix!r}; give a folder, a .gguf file or a Hub id.")
        _refuse_part(path)
        return Location(model, path.parent, gguf_file=path.name)
    if path.is_dir():
        return _in_folder(model, path)
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise SourceError(f"{model} does not exist{did_you_mean(model)}; give a folder, a .gguf file or a Hub id.")
    name, _, revision = model.partition("@")
    folder = _fetched(model, name, revision or None, _SMALL_FILES)
    location = Location(model, folder, revision=folder.name)
    if weights:
        explicit = check_config(inside(folder, "config.json")).get("transformers_weights")
        index = explicit or INDEX
        wanted = [explicit or SINGLE]
        if (folder / index).is_file():
            wanted += weight_files(folder, index).files
        _fetched(model, name, location.revision, wanted)
    _refuse_links(folder)
    return location


def _fetched(model: str, name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        # The Hub client raises its own, the network library's and the system's exceptions.
        raise SourceError(
            f"{model} is neither a folder nor a .gguf file here{did_you_mean(model)}, and the Hub does not give it "
            f"({first_line(error)}); check the name and the network."
        ) from error


def _in_folder(model: str, folder: Path) -> Location:
    _refuse_links(folder)
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() and (not files or any(folder.glob("*.safetensors*"))):
        return Location(model, folder)
    for file in files:
        _refuse_part(file)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise SourceError(f"{model} holds {len(files)} GGUF files ({names}); name one of them.")
    if not files:
        raise SourceError(f"{model} holds neither config.json nor a .gguf file; give the folder of a checkpoint.")
    return Location(model, folder, gguf_file=files[0].name)


def _refuse_part(file: Path) -> None:
    part = _PART.search(file.name)
    if part is not None:
        raise split_gguf(file.name, int(part[1]))


def split_gguf(file: str, parts: int) -> SourceError:
    """The refusal of one of ``parts`` files of a model."""
    return SourceError(
        f"{file} is one of the {parts} parts of a split GGUF, which Transformers does not read; join them with "
        "llama-gguf-split --merge."
    )


def _refuse_links(folder: Path) -> None:
    """Raises `SourceError` for a link out of the folder, or to nothing, among the files that may be read."""
    for pattern in (*_SMALL_FILES, "*.gguf", f"{_TEMPLATES}/*.jinja"):
        for file in sorted(folder.glob(pattern)):
            inside(folder, str(file.relative_to(folder)))
