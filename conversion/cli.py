"""The command line: ``mla inspect | plan | convert | run | verify``. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import CalibrationError, ConversionError

if TYPE_CHECKING:
    from .plan import ConversionPlan
    from .sources import SourceModel
from .progress import shown_progress

app = typer.Typer(
    help="Converts standard attention to Multi-head Latent Attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130

Model = Annotated[str, typer.Argument(help="A folder, a .gguf file, a folder with one, or a Hub id (name[@revision]).")]
Output = Annotated[Path, typer.Argument(help="Folder of the new checkpoint; must not exist.")]
MethodName = Annotated[str, typer.Option(help="exact, attention_aware (compresses), or a published one: transmla, mha2mla.")]
Cache = Annotated[
    str | None,
    typer.Option(help="50% of the source's, 192 (values a token and layer), or 11520B (bytes a token; KB, KiB)."),
]
Rank = Annotated[int | None, typer.Option(help="Pins the latent's width in every layer.")]
Rotary = Annotated[int | None, typer.Option(help="Pins the rotary key's width in every layer.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="A text file, or a data set as name[@configuration][:split[:column]]. [default: a shipped mix]"),
]
Tokens = Annotated[int | None, typer.Option(help="Of calibration text.")]
Seed = Annotated[int, typer.Option(help="Of all sampling.")]
Dtype = Annotated[str | None, typer.Option(help="Of the weights written. [default: the source's]")]
Statistics = Annotated[
    Path | None, typer.Option(help="A folder that keeps what is measured on the text, for other budgets.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors become one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            _quieten()
            command(*args, debug=debug, **kwargs)
        except ConversionError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("stopped; what is done is kept, the same command goes on from there.", _INTERRUPTED)
        except Exception as error:
            if debug:
                raise
            _fail(f"internal error, {type(error).__name__}: {error}; --debug shows where.", 1)

    return run


def _fail(message: str, code: int) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {message}")
    raise typer.Exit(code)


def _quieten() -> None:
    """The bars are ours; those of the libraries are not: tqdm reads this when it is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show(value: dict[str, Any], tables: list[Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(value) + "\n")
        return
    console = Console()
    for table in tables:
        console.print(table)


@app.command()
@_reported
def inspect(
    model: Annotated[str | None, typer.Argument(help="As for the other commands; or give --config.")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json of any model, with or without weights.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence. [default: 131072]")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG of the cache over the context.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What a model is, and what its cache costs."""
    from .inspection import inspect_model
    from .memory_report import report_memory

    if (model is None) == (config is None):
        raise ConversionError("give either a model or --config FILE.")
    shown: dict[str, Any] = {}
    tables: list[Any] = []
    if model is not None:
        inspection = inspect_model(model)
        shown, tables = inspection.as_json(), [inspection.table()]
    if config is not None or context is not None or plot is not None:
        report = report_memory(config or str(model), context)
        shown, tables = shown | report.as_json(), tables + report.tables()
        if plot is not None:
            from .plots import plot_cache

            plot_cache(report, plot)
    _show(shown, tables, as_json)


@app.command()
@_reported
def plan(
    model: Model,
    output: Annotated[Path, typer.Option(help="Where the checkpoint would go.")] = Path("out"),
    method: MethodName = "attention_aware",
    cache: Cache = None,
    kv_lora_rank: Rank = None,
    qk_rope_head_dim: Rotary = None,
    calibration: Calibration = None,
    tokens: Tokens = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Ranks, cache size, expected time and memory of a conversion."""
    _, made = _plan(model, output, method, cache, kv_lora_rank, qk_rope_head_dim, calibration, tokens, seed, dtype)
    _show(made.as_json(), [made.table(f"{model} → {output}")], as_json)


@app.command()
@_reported
def convert(
    model: Model,
    output: Output,
    method: MethodName = "attention_aware",
    cache: Cache = None,
    kv_lora_rank: Rank = None,
    qk_rope_head_dim: Rotary = None,
    calibration: Calibration = None,
    tokens: Tokens = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    statistics: Statistics = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Converts a model; a stopped conversion goes on with the same command."""
    source, made = _plan(
        model, output, method, cache, kv_lora_rank, qk_rope_head_dim, calibration, tokens, seed, dtype, statistics
    )
    _execute(source, made, dry_run)


@app.command()
@_reported
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with the options of convert, and source and output.")],
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Converts a model by a recipe file."""
    from .plan import make_plan
    from .recipe import read_recipe
    from .sources import open_source

    asked = read_recipe(recipe)
    source = open_source(asked.source)
    _execute(source, make_plan(asked, source), dry_run)


def _execute(source: SourceModel, made: ConversionPlan, dry_run: bool) -> None:
    from .convert import run_plan

    started = time.monotonic()
    output = made.recipe.output
    _show({}, [made.table(f"{made.recipe.source} → {output}")], as_json=False)
    if dry_run:
        return
    with shown_progress() as progress:
        finished = run_plan(made, source, progress)
    _show({}, finished.report.tables()[:1], as_json=False)
    Console().print(f"{output} is ready after {time.monotonic() - started:.0f} s.", highlight=False, soft_wrap=True)


@app.command()
@_reported
def verify(
    output: Annotated[Path, typer.Argument(help="The converted checkpoint.")],
    against: Annotated[str, typer.Option(help="The model that it was made from.")],
    text: Annotated[Path | None, typer.Option(help="A text file. [default: held-out text]")] = None,
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows of 1024 tokens.")] = 32,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compares a converted checkpoint with its source."""
    from .report import verification_table
    from .sources import open_source
    from .verify import HELD_OUT, held_out_windows, text_windows, verify_checkpoint, window_length

    source = open_source(against)
    tokenizer, length = source.location.tokenizer(), window_length(source)
    if text is None:
        ids, name = held_out_windows(tokenizer, length, windows), HELD_OUT
    else:
        ids, name = text_windows(_read(text), str(text), tokenizer, length, windows), text.name
    with shown_progress() as progress:
        found = verify_checkpoint(output, source, ids, name, progress)
    _show(found.as_json(), [verification_table(found)], as_json)


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{text} cannot be read as UTF-8 text: {error}.") from error


def _plan(
    model: str,
    output: Path,
    method: str,
    cache: str | None,
    kv_lora_rank: int | None,
    qk_rope_head_dim: int | None,
    calibration: str | None,
    tokens: int | None,
    seed: int,
    dtype: str | None,
    statistics: Path | None = None,
):
    from .plan import make_plan
    from .recipe import DEFAULT_TOKENS, make_recipe
    from .sources import open_source

    recipe = make_recipe(
        source=model,
        output=output,
        method=method,
        cache=cache,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        calibration=calibration,
        tokens=DEFAULT_TOKENS if tokens is None else tokens,
        seed=seed,
        dtype=dtype,
        statistics=statistics,
    )
    source = open_source(model)
    return source, make_plan(recipe, source)


def main() -> None:
    """The console script ``mla``."""
    app()
