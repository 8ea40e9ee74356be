"""The text that a conversion calibrates on, and is judged by, when the user names none: three domains, all offline.

Calibrating on one domain damages the others, so the default is a balance: encyclopaedic and news prose (test data of
the gensim package), documentation (`pydoc_data.topics`) and code (modules of the standard library). Each domain holds
some of its documents back for evaluation.
"""

from __future__ import annotations

import bz2
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

DOMAINS = ("prose", "documentation", "code")

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
_ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
_SHORTEST_ARTICLE = 2000
"""Characters; below it a page is a redirect or a list of links."""


def calibration_documents(domain: str) -> list[str]:
    """The documents of one domain, the held-out ones excluded, in a fixed order."""
    if domain == "prose":
        articles = [text for title, text in _articles() if title not in _HELD_OUT_ARTICLES]
        return [*articles, _gensim_data(_NEWS).read_text(encoding="utf-8")]
    if domain == "documentation":
        return _without(_topics()[_HELD_OUT_TOPICS:], _topics()[:_HELD_OUT_TOPICS])
    return [_module_source(module) for module in _MODULES]


def evaluation_texts() -> dict[str, str]:
    """Held-out text by domain: nothing of it is in `calibration_documents`."""
    return {
        "prose": "\n\n".join(text for title, text in _articles() if title in _HELD_OUT_ARTICLES),
        "documentation": "\n\n".join(_topics()[:_HELD_OUT_TOPICS]),
        "code": _module_source(_HELD_OUT_MODULE),
    }


@cache
def _articles() -> tuple[tuple[str, str], ...]:
    return tuple(_read_articles())


def _read_articles() -> Iterator[tuple[str, str]]:
    """(title, plain text) of the Wikipedia articles; the markup that gensim leaves is taken out."""
    from gensim.corpora import wikicorpus

    with bz2.open(_gensim_data(_ARTICLES), "rb") as dump:
        for title, markup, _ in wikicorpus.extract_pages(dump):
            text = re.sub(r"'{2,}", "", wikicorpus.filter_wiki(markup))
            text = re.sub(r"\n{3,}", "\n\n", text).strip()
            if len(text) >= _SHORTEST_ARTICLE and "(disambiguation)" not in title:
                yield title, text


def _gensim_data(name: str) -> Path:
    from gensim.test.utils import datapath

    return Path(datapath(name))


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return list(topics.values())


def _without(documents: list[str], held_out: list[str]) -> list[str]:
    """Leaves out every paragraph of the held-out documents: topics repeat sections of each other."""
    known = {paragraph for document in held_out for paragraph in document.split("\n\n")}
    return ["\n\n".join(part for part in document.split("\n\n") if part not in known) for document in documents]


def _module_source(module: str) -> str:
    path = Path(sysconfig.get_path("stdlib"), *module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
