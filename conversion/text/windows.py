"""Text to calibration windows: read, streamed, shuffled by a seed, packed to equal lengths."""

from __future__ import annotations

import codecs
import logging
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint.paths import did_you_mean
from ..errors import CalibrationError, first_line
from .default_mix import calibration_documents, turns
from .rendering import TemplateError, render

_TEXT_SUFFIXES = {".txt", ".md", ".rst"}
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_CHARACTERS_PER_TOKEN = 8
"""Upper estimate: how much text to take from a stream for a number of tokens."""
_PAGE_WINDOWS = 2
"""Documents are shuffled in pages of about this many windows, so that a few long ones do not fill the sample."""
_SHUFFLE_BUFFER = 1000
_TEXT_COLUMN, _CHAT_COLUMN = "text", "messages"
"""Of a data set whose column is not named."""
_ROWS = 64
"""Of a data set, whose conversations are rendered together."""
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_READ_BYTES = 2**20


def load_windows(
    spec: str | None, tokenizer: PreTrainedTokenizerBase, window: int, tokens: int, seed: int
) -> LongTensor:
    """Reads a calibration text and cuts it into windows of equal length.

    Args:
        spec: None for the default balance of domains (`default_mix`); a file (``.txt``, ``.md``, ``.rst``,
            ``.jsonl``, ``.json`` or ``.parquet``, the latter with a column ``text`` or ``messages``); or a dataset of
            the Hub as ``name[@configuration][:split[:column]]``, streamed. Messages go through the chat template.
        tokenizer: of the model that will read the windows.
        window: tokens in a window.
        tokens: how many tokens to take, at least one window; fewer are returned where the text ends before.
        seed: of the shuffle.

    Returns:
        ``[N, window]``, token ids without special tokens.

    Raises:
        CalibrationError: the file is missing, of an unknown kind, empty, or shorter than one window.
    """
    count = max(1, tokens // window)
    if spec is None:
        return cast(LongTensor, _balanced(tokenizer, window, count, seed))
    documents = head(documents_of(spec, tokenizer, seed), tokens)
    windows = pack(documents, tokenizer, window, count, seed)
    if len(windows) == 0:
        found = len(tokenised("".join(documents), tokenizer))
        raise CalibrationError(
            f"calibration text {spec} has {found} tokens, fewer than one window of {window}; give a longer text or a "
            "smaller window."
        )
    return cast(LongTensor, windows)


def _balanced(tokenizer: PreTrainedTokenizerBase, window: int, count: int, seed: int) -> Tensor:
    """Windows of every domain by turns, as long as it has any."""
    order = turns(tokenizer)
    left = {
        domain: list(pack(calibration_documents(domain, tokenizer), tokenizer, window, count, seed).flip(0))
        for domain in dict.fromkeys(order)
    }
    taken: list[Tensor] = []
    while any(left.values()):
        taken += [left[domain].pop() for domain in order if left[domain]]
    return torch.stack(taken[:count])


def documents_of(spec: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """The documents of a file or data set, as `load_windows` names them, with its errors."""
    path = Path(spec)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in _TEXT_SUFFIXES:
        yield read_text(path)
    elif path.is_file() and suffix in _BUILDERS:
        if _BUILDERS[suffix] == "json":
            _require_utf8(path)
        rows = _rows(spec, seed, path=_BUILDERS[suffix], data_files=spec, split="train")
        yield from _rendered(rows, tokenizer, spec)
    elif path.exists() or suffix in _TEXT_SUFFIXES | set(_BUILDERS):
        missing = (
            f"does not exist{did_you_mean(path)}"
            if not path.exists()
            else "is a folder"
            if path.is_dir()
            else "is of an unknown kind"
        )
        known = ", ".join(sorted(_TEXT_SUFFIXES | set(_BUILDERS)))
        raise CalibrationError(f"calibration file {spec} {missing}; give a file ({known}) or the name of a dataset.")
    else:
        name, _, rest = spec.partition(":")
        split, _, column = rest.partition(":")
        name, _, configuration = name.partition("@")
        rows = _rows(spec, seed, column, path=name, name=configuration or None, split=split or "train")
        yield from _rendered(rows, tokenizer, spec)


def _rendered(rows: Iterator[Any], tokenizer: PreTrainedTokenizerBase, spec: str) -> Iterator[str]:
    """Rows as text: conversations in the model's own template."""
    while taken := list(islice(rows, _ROWS)):
        conversations = [row for row in taken if not isinstance(row, str)]
        if conversations and tokenizer.chat_template is None:
            raise CalibrationError(
                f"calibration data {spec} holds messages, and the model has no chat template; give rows of text."
            )
        try:
            template = tokenizer.get_chat_template() if conversations else ""
            texts = iter(render(template, conversations, tokenizer.special_tokens_map) if conversations else ())
        except (TemplateError, ValueError) as error:
            raise CalibrationError(
                f"calibration data {spec} holds messages, and the chat template {first_line(error)}; give rows of text."
            ) from error
        yield from (row if isinstance(row, str) else next(texts) for row in taken)


def read_text(path: Path) -> str:
    """The contents of a text file. Raises `CalibrationError` where they are no UTF-8 text."""
    _require_utf8(path)
    return path.read_text(encoding="utf-8")


def _require_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(_READ_BYTES):
                decoder.decode(block)
                done += len(block)
            decoder.decode(b"", final=True)
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read: {error.strerror}{did_you_mean(path)}; give another file."
        ) from error
    except UnicodeDecodeError as error:
        with open(path, "rb") as file:
            encoding = "UTF-16" if file.read(2) in _UTF_16 else "LATIN1"
        raise CalibrationError(
            f"{path} is no UTF-8 text (near byte {done + error.start}); convert it, if it is {encoding} with: "
            f"iconv -f {encoding} -t UTF-8."
        ) from error


def _rows(spec: str, seed: int, column: str = "", **source: str | None) -> Iterator[Any]:
    """Texts or lists of messages, a column of a dataset, streamed and shuffled in a buffer."""
    import datasets

    named, column = bool(column), column or _TEXT_COLUMN
    next_step = f"rename one to {column!r}" if "data_files" in source else "name one as name:split:column"
    # It logs, with a traceback, what it raises as well.
    datasets.logging.set_verbosity(logging.CRITICAL + 1)
    try:
        rows = datasets.load_dataset(**source, streaming=True).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for row in rows:
            if not named and _TEXT_COLUMN not in row and _CHAT_COLUMN in row:
                column = _CHAT_COLUMN
            if column not in row:
                raise CalibrationError(
                    f"calibration data {spec} has no column {column!r}, only {', '.join(row)}; {next_step}."
                )
            text = row[column]
            if isinstance(text, str) or _are_messages(text):
                yield text
            elif text is not None:
                if isinstance(text, list):
                    next_step = "messages are a list of role and content"
                raise CalibrationError(
                    f"column {column!r} of calibration data {spec} holds {type(text).__name__}, no text; {next_step}."
                )
    except CalibrationError:
        raise
    except Exception as error:
        # `datasets` raises whatever its readers and the network raise; the user needs the name and the reason.
        raise CalibrationError(f"calibration data {spec} cannot be read: {first_line(error)}") from error


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )


def head(documents: Iterable[str], tokens: int) -> list[str]:
    """The first documents that together have so many tokens at least; a single file is taken whole."""
    taken, total = [], 0
    for document in documents:
        taken.append(document)
        total += len(document)
        if total >= tokens * _CHARACTERS_PER_TOKEN:
            break
    return taken


def pages_of(document: str, characters: int) -> Iterator[str]:
    """Cuts a document at line ends into pages of about ``characters``."""
    page: list[str] = []
    size = 0
    for line in document.splitlines(keepends=True):
        page.append(line)
        size += len(line)
        if size >= characters:
            yield "".join(page)
            page, size = [], 0
    if page:
        yield "".join(page)


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, window: int, count: int, seed: int) -> Tensor:
    """Shuffles pages and joins their tokens to at most ``count`` windows: ``[<= count, window]``."""
    size = _PAGE_WINDOWS * window * _CHARACTERS_PER_TOKEN // 2
    pages = [page for document in documents for page in pages_of(document, size)]
    random.Random(seed).shuffle(pages)
    ids: list[int] = []
    for page in pages:
        ids += tokenised(page + "\n\n", tokenizer)
        if len(ids) >= window * count:
            break
    complete = min(len(ids) // window, count)
    return torch.tensor(ids[: complete * window], dtype=torch.long, device="cpu").view(complete, window)


def tokenised(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
