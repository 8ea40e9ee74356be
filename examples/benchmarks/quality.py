"""Perplexity against the bytes of the cache: conversion methods times budgets on one model.

A budget is a share of the source's bytes, which `mla convert` spends on values and bits, with ``--bits 16`` on values
alone. A row tells what its cache holds for a window of the held-out texts, all included.

Every method calibrates once for all its budgets. Rows that the output already holds are kept, so a stopped benchmark
goes on with the same command. Writes ``quality.json``, ``quality.md`` and ``quality.png``.

    python examples/benchmarks/quality.py MODEL RESULTS --text test.txt --calibration calibration.txt
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_picture import draw
from quanto_cache import QUANTO_BITS, quanto_perplexity, quanto_share
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel
from transformers.utils import is_optimum_quanto_available

from conversion.checkpoint.atomic import write_text
from conversion.checkpoint.location import locate
from conversion.devices.choice import AUTO, chosen_device
from conversion.errors import BudgetError
from conversion.evaluation.loading import load_model
from conversion.evaluation.recall import measure_recall
from conversion.evaluation.scores import perplexity
from conversion.evaluation.source_in_few_bits import KIVI_BITS, kivi_share, reading_in_few_bits
from conversion.evaluation.verify import text_windows
from conversion.methods import METHODS
from conversion.pipeline.conversion import run_plan
from conversion.planning.plan import make_plan
from conversion.planning.text_use import window_length
from conversion.progress import counting, shown_progress
from conversion.recipe import DEFAULT_TOKENS, make_recipe
from conversion.sources import SourceModel, open_source

BUDGETS = "100%,75%,50%,37.5%,31%,25%,22%,15%,12.5%,8%,6.25%"
PACKAGES = ("modeling-mla", "torch", "transformers")


def settings(model: str, calibration: str | None, tokens: int, text: Path, windows: int, seed: int) -> dict[str, Any]:
    """What all rows share; rows of other settings are not comparable."""
    return {
        "model": locate(model).name,
        "calibration": "default mix" if calibration is None else Path(calibration).name,
        "calibration_tokens": tokens,
        "text": text.name,
        "windows": windows,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def convert_and_score(
    source: SourceModel, recipe: dict[str, Any], texts: dict[int, torch.Tensor], work: Path, progress: Progress
) -> dict[str, Any]:
    """One row of the table: converts, measures, deletes the checkpoint."""
    asked = make_recipe(**recipe, source=source.location.model, output=work / "checkpoint", dtype="float32")
    plan = make_plan(asked, source)
    start = time.perf_counter()
    report = run_plan(plan, source, progress).report
    converted = time.perf_counter()
    model = load_model(locate(str(asked.output)), source.device)
    found = perplexities(model, texts, f"{asked.method} {asked.cache}", progress)
    layers, held_out = report.budgets, report.verification
    recall = None
    if len(texts) > 1:
        original, tokenizer = load_model(source.location, source.device), source.location.tokenizer()
        recall = measure_recall(original, model, tokenizer, list(texts)[1], asked.seed).as_json()
    return {
        "method": asked.method,
        "cache": asked.cache,
        "asked_bits": asked.latent_bits,
        "cache_share": held_out.cache_bytes_held / (held_out.window * held_out.cache_bytes_per_token_source),
        "latent_bits": sum(layer.latent_bits for layer in layers) / len(layers),
        "rope_bits": sum(layer.rope_bits for layer in layers) / len(layers),
        "qk_rope_head_dim": sum(layer.qk_rope_head_dim for layer in layers) / len(layers),
        "kv_lora_rank": sum(layer.kv_lora_rank for layer in layers) / len(layers),
        "perplexity": next(iter(found.values())),
        "perplexity_by_context": found,
        "recall": recall,
        "held_out_kl": held_out.kl,
        "held_out_kl_by_text": {domain.text: domain.kl for domain in held_out.domains},
        "held_out_top1_agreement": held_out.top1_agreement,
        "seconds_to_convert": round(converted - start, 1),
        "seconds_to_score": round(time.perf_counter() - converted, 1),
    }


def perplexities(
    model: PreTrainedModel, texts: dict[int, torch.Tensor], name: str, progress: Progress
) -> dict[str, float]:
    """By window, in which a text of as many tokens is read."""
    with counting(progress, name, sum(len(windows) for windows in texts.values())) as step:
        return {str(length): perplexity(model, windows, step) for length, windows in texts.items()}


def kivi_perplexity(model: PreTrainedModel, windows: torch.Tensor, bits: int, step: Callable[[], None]) -> float:
    """Of windows ``[N, S]`` read through KIVI's form of the cache."""
    with reading_in_few_bits(model, bits):
        return perplexity(model, windows, step)


def quantised_source(model: PreTrainedModel, windows: torch.Tensor, progress: Progress) -> list[dict[str, Any]]:
    """Rows of the source itself, its cache in few bits."""
    forms = {
        "KIVI": (KIVI_BITS, lambda bits: kivi_share(bits, windows.shape[1]), kivi_perplexity),
        "QuantizedCache": (QUANTO_BITS, quanto_share, quanto_perplexity),
    }
    rows = []
    for name, (widths, share, scored) in forms.items():
        if name == "QuantizedCache" and not is_optimum_quanto_available():
            progress.console.print("QuantizedCache needs optimum-quanto: left out", highlight=False)
            continue
        for bits in widths:
            with counting(progress, f"{name}, {bits} bits", len(windows)) as step:
                found = scored(model, windows, bits, step)
            rows.append({"form": name, "bits": bits, "cache_share": share(bits), "perplexity": found})
    return rows


def shown_ratio(perplexity: float | None, source: float) -> str:
    """Of a perplexity to the source's; rows of a run with fewer contexts lack some."""
    return "-" if perplexity is None else f"{perplexity / source:.3f}"


def shown_recall(recall: dict[str, Any] | None) -> str:
    """Needles and copies beside the source's."""
    if recall is None:
        return "- | -"
    return " | ".join(f"{recall[name]:.0%} of {recall[f'{name}_source']:.0%}" for name in ("needle", "copy"))


def markdown(result: dict[str, Any]) -> str:
    """The table, one row for each method and budget."""
    base, common = result["perplexity_source"], result["settings"]
    sources = result["perplexity_source_by_context"]
    longer = list(sources)[1:]
    lines = [
        f"{common['model']}, {common['windows']} windows of {common['text']}; source {base:.3f}. Calibrated on "
        f"{common['calibration_tokens']} tokens of {common['calibration']}, seed {common['seed']}; "
        f"{common['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in common["versions"].items())
        + ". KL to the source and equal most likely tokens are on the held-out default texts. Seconds are "
        "of the conversion with its verification; those of a method's first row include its calibration.",
        "",
        "| method | cache | rotary + latent | bits | perplexity | x source |"
        + "".join(f" at {length} |" for length in longer)
        + " KL | top-1 | needle | copy | seconds |",
        "|---|---:|---:|---:|---:|---:|" + "---:|" * len(longer) + "---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['method']} | {row['cache_share']:.1%} | {row['qk_rope_head_dim']:.0f} + {row['kv_lora_rank']:.0f} | "
        f"{row['rope_bits']:g} + {row['latent_bits']:g} | "
        f"{row['perplexity']:.2f} | {row['perplexity'] / base:.3f} | "
        + "".join(f"{shown_ratio(row['perplexity_by_context'].get(length), sources[length])} | " for length in longer)
        + f"{row['held_out_kl']:.3f} | {row['held_out_top1_agreement']:.1%} | {shown_recall(row['recall'])} | "
        f"{row['seconds_to_convert']:.0f} |"
        for row in result["rows"]
    ]
    lines += ["", "| the source's own cache | bytes | perplexity | x source |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['form']}, {row['bits']} bits | {row['cache_share']:.1%} | {row['perplexity']:.2f} | "
        f"{row['perplexity'] / base:.3f} |"
        for row in result["quantised_source"]
    ]
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], folder: Path) -> None:
    """The three files, each complete or as it was."""
    write_text(folder / "quality.json", json.dumps(result, indent=2) + "\n")
    write_text(folder / "quality.md", markdown(result))
    draw(folder)


def main(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, or a Hub id.")],
    results: Annotated[Path, typer.Argument(help="Folder of the results.")],
    text: Annotated[Path, typer.Option(help="The text to report on.")],
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(METHODS),
    budgets: Annotated[str, typer.Option(help="Separated by commas; what a method cannot meet is left out.")] = BUDGETS,
    bits: Annotated[int | None, typer.Option(help="As for mla convert. [default: chosen with the values]")] = None,
    calibration: Annotated[str | None, typer.Option(help="As for mla convert. [default: a shipped mix]")] = None,
    tokens: Annotated[int, typer.Option(help="Of calibration text.")] = DEFAULT_TOKENS,
    windows: Annotated[int, typer.Option(help="Of 1024 tokens, from the start of the text.")] = 32,
    contexts: Annotated[
        str, typer.Option(help="Longer windows of as much text; recall is at the first.")
    ] = "4096,8192",
    seed: Annotated[int, typer.Option(help="Of all sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Converts and scores; see the module."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
    source = open_source(model).on(chosen_device(AUTO))
    common = settings(model, calibration, tokens, text, windows, seed)
    results.mkdir(parents=True, exist_ok=True)
    file = results / "quality.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": common, "rows": []}
    if result["settings"] != common:
        raise typer.BadParameter(f"{file} holds rows of other settings; choose another folder.")
    content = text.read_text(encoding="utf-8")
    short = window_length(source)
    lengths = [short, *(int(length) for length in contexts.split(",") if short < int(length) <= source.context)]
    counts = {length: max(1, windows * short // length) for length in lengths}
    tokenizer = source.location.tokenizer()
    texts = {length: text_windows(content, text.name, tokenizer, length, count) for length, count in counts.items()}
    done = {(row["method"], row["cache"], row["asked_bits"]) for row in result["rows"]}
    with shown_progress() as progress:
        if "perplexity_source" not in result:
            model = load_model(source.location, source.device)
            found = perplexities(model, texts, "source", progress)
            result |= {"perplexity_source": found[str(short)], "perplexity_source_by_context": found}
            result["quantised_source"] = quantised_source(model, texts[short], progress)
            del model
            write(result, results)
        for method in methods.split(","):
            recipe = {"method": method, "calibration": calibration, "tokens": tokens, "seed": seed}
            recipe["latent_bits"] = bits
            recipe["statistics"] = statistics = results / f"statistics-{method}"
            for cache in budgets.split(","):
                if (method, cache, bits) in done:
                    continue
                with tempfile.TemporaryDirectory(dir=results, prefix=".checkpoint-") as work:
                    try:
                        row = convert_and_score(source, recipe | {"cache": cache}, texts, Path(work), progress)
                    except BudgetError as error:
                        progress.console.print(f"{method} {cache}: {error}", highlight=False)
                        continue
                result["rows"].append(row)
                result["rows"].sort(key=lambda row: (row["method"], -row["cache_share"]))
                write(result, results)
            shutil.rmtree(statistics, ignore_errors=True)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(markdown(result), highlight=False)


if __name__ == "__main__":
    typer.run(main)
