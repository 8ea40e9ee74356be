"""Converts a model, verifies it, and lets it answer in a process that has only Transformers.

python examples/demo.py MODEL OUT --cache 50%
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from conversion.errors import ConversionError
from conversion.pipeline.conversion import Conversion, make_plan, run_plan
from conversion.progress import peak_memory, shown_progress
from conversion.recipe import make_recipe
from conversion.reporting.report_files import JSON_NAME
from conversion.sources import open_source

_ANSWER = Path(__file__).resolve().with_name("generate_without_package.py")


def main() -> None:
    """Converts, shows what was measured, and asks the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, a .gguf file, or a Hub id")
    parser.add_argument("output", type=Path, help="folder of the new checkpoint; that of an earlier demo is replaced")
    parser.add_argument("--cache", default="50%", help="share of the source's cache")
    parser.add_argument("--prompt", default="What is the capital of France?")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, started = Console(), time.monotonic()
    try:
        finished = convert(arguments.model, arguments.output, arguments.cache, console)
    except ConversionError as error:
        raise SystemExit(f"error: {error}") from None
    show(finished, time.monotonic() - started, console)
    answer(finished.output, arguments.prompt)


def convert(model: str, output: Path, cache: str, console: Console) -> Conversion:
    """Converts and verifies; shows the plan and the progress."""
    source = open_source(model)
    plan = make_plan(make_recipe(source=model, output=output, cache=cache), source)
    console.print(plan.table(f"{source.location.name} → {output}"))
    if (output / JSON_NAME).is_file():
        shutil.rmtree(output)
    with shown_progress() as progress:
        return run_plan(plan, source, progress)


def show(finished: Conversion, seconds: float, console: Console) -> None:
    """Prints what was measured."""
    found = finished.report.verification
    table = Table("", "source", "converted", title=f"{finished.report.location.name}, {found.text}")
    table.add_row("cache, bytes a token", str(found.cache_bytes_per_token_source), str(found.cache_bytes_per_token))
    table.add_row("perplexity", f"{found.perplexity_source:.2f}", f"{found.perplexity:.2f}")
    table.add_row("seconds, conversion and verification", "", f"{seconds:.0f}")
    table.add_row("peak memory, GiB", "", f"{peak_memory() / 2**30:.2f}")
    console.print(table)


def answer(checkpoint: Path, prompt: str) -> None:
    """Asks the checkpoint in a fresh, isolated interpreter, away from this folder."""
    command = [sys.executable, "-I", str(_ANSWER), str(checkpoint.resolve()), prompt]
    with TemporaryDirectory() as elsewhere:
        subprocess.run(command, cwd=elsewhere, check=True)


if __name__ == "__main__":
    main()
