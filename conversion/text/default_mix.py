"""The text that a conversion calibrates on, and is judged by, when the user names none; all of it is offline.

Calibrating on one domain damages the others, so the default is a balance: encyclopaedic and news prose (test data of
the gensim package), some of it printed as corpora of language modelling print it; documentation
(`pydoc_data.topics`), code (modules of the standard library); conversations about these, where the tokenizer has a
chat template; and another language, where the tokenizer knows it. Each domain holds some of its documents back for
evaluation.
"""

from __future__ import annotations

import bz2
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from textwrap import TextWrapper

from transformers import PreTrainedTokenizerBase

from .rendering import Conversation, TemplateError, render

_PLAIN = ("prose", "documentation", "code")
_CHAT = "chat"
_TOKENISED = "tokenised prose"
_LANGUAGE = "Bulgarian"
_TURNS = ("prose", "documentation", _CHAT, _TOKENISED, "code", _LANGUAGE, "prose", "documentation", "code")
"""Prose varies most, so it comes most often; conversations are made of the others."""
_TOKENISED_SHARE = 3
"""One in so many articles is printed so."""
_TOKENS_PER_CHARACTER = 0.6
"""Of a language that the tokenizer knows, at most; one that it spells out byte by byte has more."""

_SAMPLE = 5000
"""Characters that tell whether it does."""

_HELD_OUT_ARTICLES = ("Apollo 8", "Alchemy", "Atlantic Ocean", "Ayn Rand")
_HELD_OUT_TOPICS = 6
_HELD_OUT_MODULE = "argparse"
_MODULES = (
    "abc", "ast", "asyncio.base_events", "asyncio.streams", "bdb", "bisect", "calendar", "cmd", "codecs",
    "collections", "concurrent.futures.thread", "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime",
    "decimal", "difflib", "dis", "doctest", "email.message", "enum", "fileinput", "fractions", "ftplib", "functools",
    "gettext", "glob", "gzip", "heapq", "html.parser", "http.client", "http.cookiejar", "inspect", "ipaddress",
    "json.decoder", "json.encoder", "linecache", "locale", "logging", "mailbox", "mimetypes", "multiprocessing.pool",
    "netrc", "numbers", "optparse", "os", "pathlib", "pdb", "pickle", "platform", "plistlib", "poplib", "pprint",
    "profile", "pstats", "queue", "random", "re", "reprlib", "sched", "selectors", "shelve", "shlex", "shutil",
    "smtplib", "socket", "socketserver", "sqlite3.dbapi2", "ssl", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "typing", "unittest.case",
    "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom",
    "xml.etree.ElementTree", "zipfile",
)  # fmt: skip
_ENGLISH = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_BULGARIAN = "bgwiki-latest-pages-articles-shortened.xml.bz2"
_HELD_OUT_BULGARIAN = "Григориански календар"
_NEWS = "lee_background.cor"
_SHORTEST_ARTICLE = 2000
"""Characters; below it a page is a redirect or a list of links."""
_CHAT_CHARACTERS = 6000
"""Of a document that a conversation is about, so that none of the three kinds outweighs the others."""
_ANSWER = TextWrapper(1500, expand_tabs=False, replace_whitespace=False, drop_whitespace=False)

Document = tuple[str, str]
"""Title and text."""


def turns(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The domains of the default text for models with this tokenizer, in the order and as often as they come."""
    left_out = set()
    if tokenizer.chat_template is None or template_failure(tokenizer) is not None:
        left_out.add(_CHAT)
    sample = "".join(text for _, text in _articles(_BULGARIAN))[:_SAMPLE]
    if len(tokenizer(sample, verbose=False)["input_ids"]) > _TOKENS_PER_CHARACTER * len(sample):
        left_out.add(_LANGUAGE)
    return tuple(domain for domain in _TURNS if domain not in left_out)


def calibration_documents(domain: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of one domain, the held-out ones excluded, in a fixed order."""
    return _texts(domain, tokenizer, held_out=False)


def evaluation_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Held-out text by domain: nothing of it is in `calibration_documents`."""
    domains = dict.fromkeys(turns(tokenizer))
    return {domain: "\n\n".join(_texts(domain, tokenizer, held_out=True)) for domain in domains}


def template_failure(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why the tokenizer's chat template leaves conversations out of the default text, or None where it does not."""
    try:
        _conversations(tokenizer)
    except TemplateError as error:
        return str(error)
    return None


def held_out_prose() -> str:
    """The prose of `evaluation_texts`."""
    return "\n\n".join(text for _, text in _documents("prose", held_out=True))


def _texts(domain: str, tokenizer: PreTrainedTokenizerBase, held_out: bool) -> list[str]:
    if domain == _CHAT:
        return _conversations(tokenizer)[held_out]
    return [text for _, text in _documents(domain, held_out)]


def _documents(domain: str, held_out: bool) -> list[Document]:
    if domain == "prose":
        articles = _prose(held_out)
        if held_out:
            return articles
        del articles[::_TOKENISED_SHARE]
        return [*articles, ("the news", _gensim_data(_NEWS).read_text(encoding="utf-8"))]
    if domain == _TOKENISED:
        return [(title, _tokenised(text)) for title, text in _prose(held_out)[::_TOKENISED_SHARE]]
    if domain == "documentation":
        first, others = _topics()[:_HELD_OUT_TOPICS], _topics()[_HELD_OUT_TOPICS:]
        return first if held_out else _without(others, first)
    if domain == "code":
        return [(module, _module_source(module)) for module in ((_HELD_OUT_MODULE,) if held_out else _MODULES)]
    return [article for article in _articles(_BULGARIAN) if (article[0] == _HELD_OUT_BULGARIAN) == held_out]


def _prose(held_out: bool) -> list[Document]:
    return [article for article in _articles(_ENGLISH) if (article[0] in _HELD_OUT_ARTICLES) == held_out]


def _tokenised(text: str) -> str:
    """The text as WikiText and the Penn Treebank print theirs: spaces round punctuation, hyphens as ``@-@``.

    Models are compared on such text, and one whose calibration lacked the print is farther from its source there than
    on the same prose in its usual print.
    """
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<=\w)'(?=\w)", " '", text)
    text = re.sub(r'(?<!@)([,;:!?()\[\]"=])(?!@)|(?<!\b[A-Z])(\.)(?=\s|$)', r" \1\2 ", text)
    return re.sub(" {2,}", " ", re.sub(r"\s*\n\s*", " \n ", text))


def _conversations(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Those to calibrate on and those held out, in the model's own template. Raises `TemplateError`."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        # Several templates, none of which is the default.
        raise TemplateError(f"is not the only one ({error})") from error
    if not isinstance(template, str):
        raise TemplateError(f"is no text but {type(template).__name__}")
    told, held_out = _unrendered(held_out=False), _unrendered(held_out=True)
    rendered = render(template, [*told, *held_out], tokenizer.special_tokens_map)
    return list(rendered[: len(told)]), list(rendered[len(told) :])


@cache
def _unrendered(held_out: bool) -> tuple[Conversation, ...]:
    documents = chain.from_iterable(_documents(plain, held_out) for plain in _PLAIN)
    return tuple(_conversation(title, text[:_CHAT_CHARACTERS]) for title, text in documents if text.strip())


def _conversation(title: str, text: str) -> Conversation:
    """The text as answers to somebody who wants to know more and more of it."""
    turns: Conversation = []
    for answer in _ANSWER.wrap(text):
        turns.append({"role": "user", "content": "Go on." if turns else f"Tell me about {title}."})
        turns.append({"role": "assistant", "content": answer})
    return turns


@cache
def _articles(dump: str) -> tuple[Document, ...]:
    return tuple(_read_articles(dump))


def _read_articles(name: str) -> Iterator[Document]:
    """The articles of a Wikipedia dump; the markup that gensim leaves is taken out."""
    from gensim.corpora import wikicorpus

    with bz2.open(_gensim_data(name), "rb") as dump:
        for title, markup, _ in wikicorpus.extract_pages(dump):
            text = re.sub(r"'{2,}", "", wikicorpus.filter_wiki(markup))
            text = re.sub(r"\n{3,}", "\n\n", text).strip()
            if len(text) >= _SHORTEST_ARTICLE and "(disambiguation)" not in title:
                yield title, text


def _gensim_data(name: str) -> Path:
    from gensim.test.utils import datapath

    return Path(datapath(name))


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    return list(topics.items())


def _without(documents: list[Document], held_out: list[Document]) -> list[Document]:
    """Leaves out every paragraph of the held-out documents: topics repeat sections of each other."""
    known = {paragraph for _, text in held_out for paragraph in text.split("\n\n")}
    return [(title, "\n\n".join(part for part in text.split("\n\n") if part not in known)) for title, text in documents]


def _module_source(module: str) -> str:
    path = Path(sysconfig.get_path("stdlib"), *module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
