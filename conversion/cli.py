"""The command line: ``mla inspect | plan | convert | run | verify | heal | export``.

Results go to stdout, everything else to stderr.
"""

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

from .checkpoint.paths import expanded
from .errors import ConversionError, first_line, one_line

if TYPE_CHECKING:
    from .plan import ConversionPlan
    from .sources import SourceModel
from .progress import durations, shown_progress
from .terminal import accept_all_characters, console

app = typer.Typer(
    help="Converts standard attention to Multi-head Latent Attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130
_RESUMABLE = ("convert", "run", "heal")
# Large tensors on huge pages save a fifth of the time. PyTorch looks when it allocates the first.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

Model = Annotated[str, typer.Argument(help="A folder, a .gguf file, a folder with one, or a Hub id (name[@revision]).")]
Output = Annotated[Path, typer.Argument(help="Folder of the new checkpoint; must not exist.")]
MethodName = Annotated[
    str, typer.Option(help="exact; attention_aware, which compresses; transmla or mha2mla, as their papers have it.")
]
Cache = Annotated[
    str | None,
    typer.Option(help="50% of the source's, 192 (values a token and layer), or 11520B (bytes a token; KB, KiB)."),
]
Rank = Annotated[int | None, typer.Option(help="Pins the latent's width in every layer.")]
Rotary = Annotated[int | None, typer.Option(help="Pins the rotary key's width in every layer.")]
Uniform = Annotated[
    bool, typer.Option("--uniform", help="Equal ranks and a rotary key of 64 or 32: what serving kernels take.")
]
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
        accept_all_characters()
        try:
            _quieten()
            command(*args, debug=debug, **kwargs)
        except ConversionError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            name = command.__name__
            goes_on = f" The same mla {name} goes on from there." if name in _RESUMABLE else ""
            _fail(f"stopped; nothing was published.{goes_on}", _INTERRUPTED)
        except Exception as error:
            if debug:
                raise
            if isinstance(error, OSError) and error.errno is not None:
                _fail(f"{error.filename or 'a file'}: {error.strerror}; choose another path, or free space.", 2)
            _fail(f"internal error, {type(error).__name__}: {first_line(error)}; --debug shows where.", 1)

    return run


def _fail(message: str, code: int) -> None:
    console(stderr=True).print(one_line(f"error: {message}"), soft_wrap=True)
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
    for table in tables:
        console().print(table)


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
        report = report_memory(expanded(config) if config else str(model), context)
        shown, tables = shown | report.as_json(), tables + report.tables()
        if plot is not None:
            from .plots import plot_cache

            plot_cache(report, expanded(plot))
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
    uniform: Uniform = False,
    calibration: Calibration = None,
    tokens: Tokens = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Ranks, cache size, expected time and memory of a conversion."""
    _, made = _plan(
        model, output, method, cache, kv_lora_rank, qk_rope_head_dim, uniform, calibration, tokens, seed, dtype
    )
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
    uniform: Uniform = False,
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
        model,
        output,
        method,
        cache,
        kv_lora_rank,
        qk_rope_head_dim,
        uniform,
        calibration,
        tokens,
        seed,
        dtype,
        statistics,
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

    asked = read_recipe(expanded(recipe))
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
    _show({}, finished.report.tables()[:-1], as_json=False)
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in durations(progress).items())
    ready = f"{output} is ready after {time.monotonic() - started:.0f} s: {steps}."
    console().print(ready, soft_wrap=True)


@app.command()
@_reported
def verify(
    output: Annotated[Path, typer.Argument(help="The converted checkpoint.")],
    against: Annotated[str, typer.Option(help="The model that it was made from.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file; may be repeated. [default: held-out texts]")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="At most so many of each text, from its start.")] = 32,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window. [default: 1024]")] = None,
    recall: Annotated[bool, typer.Option("--recall", help="Needle in a haystack and copying, at the context.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, by name, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. [default: all]")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compares a converted checkpoint with its source."""
    from .calibration import read_text
    from .measure import measure
    from .report import recall_table, task_table, verification_tables
    from .sources import open_source

    contents = {file.name: read_text(expanded(file)) for file in text or ()}
    names = tasks.split(",") if tasks else []
    with shown_progress() as progress:
        found = measure(
            expanded(output), open_source(against), contents, windows, context, recall, names, limit, seed, progress
        )
    tables = verification_tables(found.verification)
    if found.recall is not None:
        tables.append(recall_table(found.recall))
    if found.tasks:
        tables.append(task_table(found.tasks))
    _show(found.as_json(), tables, as_json)


@app.command()
@_reported
def heal(
    model: Annotated[str, typer.Argument(help="The converted checkpoint.")],
    teacher: Annotated[str, typer.Option(help="The model that it was made from.")],
    data: Annotated[str, typer.Option(help="A text file, or a data set as name[@configuration][:split[:column]].")],
    out: Annotated[Path, typer.Option(help="Folder of the healed checkpoint; must not exist.")],
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Of training and validation.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of minutes; can be repeated exactly.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train adapters of this rank, and merge them.")] = None,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Distils the source's logits into a converted model's attention."""
    from .healing import HealingRecipe, heal

    recipe = HealingRecipe(model, teacher, data, expanded(out), minutes=minutes, steps=steps, lora_rank=lora, seed=seed)
    with shown_progress() as progress:
        healed = heal(recipe, progress)
    change = f"validation KL {healed.kl_before:.4f} → {healed.kl_after:.4f} nats a token after {healed.steps} steps"
    end = f"{out} is ready." if healed.improved else f"not improved: {out} holds the weights of {model}."
    console().print(f"{change}; {end}", soft_wrap=True)


@app.command()
@_reported
def export(
    model: Annotated[str, typer.Argument(help="A converted checkpoint.")],
    output: Output,
    to: Annotated[str, typer.Option(help="vllm (padded for its Transformers backend).")],
    debug: Debug = False,
) -> None:
    """Writes a converted checkpoint for something else than Transformers."""
    from .exporters import export_checkpoint

    with shown_progress() as progress:
        export = export_checkpoint(model, expanded(output), to, progress)
    before, after = export.cache_bytes_per_token, export.exported_cache_bytes_per_token
    told = f"{output} is ready; its cache is {after} B a token, before {before} B."
    console().print(told, soft_wrap=True)


def _plan(
    model: str,
    output: Path,
    method: str,
    cache: str | None,
    kv_lora_rank: int | None,
    qk_rope_head_dim: int | None,
    uniform: bool,
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
        uniform=uniform,
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


if __name__ == "__main__":
    main()
