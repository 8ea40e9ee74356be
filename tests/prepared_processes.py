"""Processes that need not import torch and Transformers: forks of one that has imported them, and has done no more.

To import them takes longer than most of what the tests start. Nothing of this project is imported before the fork: a
script that forgets to do so fails as it does in its user's terminal.
"""

from __future__ import annotations

import os
import runpy
import sys
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

PREPARED = get_context("forkserver")
PREPARED.set_forkserver_preload(["transformers.trainer"])
_ROOT = Path(__file__).parents[1]


def run_prepared(*command: object, folder: Path | None = None, **environment: str) -> CompletedProcess[str]:
    """Runs a script, or ``-m`` and a module, as `subprocess.run` would with ``sys.executable`` before it.

    Args:
        command: what is run, and its arguments.
        folder: the working directory; by default this process's.
        environment: variables beside those of this process.
    """
    words = [str(word) for word in command]
    with TemporaryDirectory() as written:
        outputs = [Path(written, name) for name in ("stdout", "stderr")]
        arguments = (words, outputs, folder or Path.cwd(), os.environ | environment)
        process = PREPARED.Process(target=_run, args=arguments)
        process.start()
        process.join()
        return CompletedProcess(words, process.exitcode, *[path.read_text(encoding="utf-8") for path in outputs])


def _run(words: list[str], outputs: list[Path], folder: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    # Only pytest has the modules of tests and examples on its path.
    own = [_ROOT / "tests", _ROOT / "examples"]
    sys.path[:] = [path for path in sys.path if not any(map(Path(path).is_relative_to, own))]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, str(folder))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
