"""A conversion of a model that is larger than its memory: seconds by stage, and the peak of the process.

The source is a random Llama of the shape of Llama 3.1 8B with fewer layers, in bfloat16, written shard by shard, with
the tokenizer of MODEL. Source and conversion each have a process of their own. "32 layers" is what as many would take
at the same rate, stage by stage: weighing runs each layer's own model from there on, so its time grows with the square.

    python examples/benchmarks/sharded_conversion.py MODEL --tokens 4096
    python examples/benchmarks/sharded_conversion.py MODEL --hidden 512 --vocabulary 8192 --tokens 4096 --shard 20MB
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rows import print_rows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conversion.checkpoint.location import locate
from conversion.checkpoint.reader import PIECE
from conversion.checkpoint.writer import ShardWriter
from conversion.pipeline.conversion import run_plan
from conversion.planning.plan import make_plan
from conversion.progress import durations, peak_memory
from conversion.recipe import make_recipe
from conversion.sources import open_source

HEAD_DIM, KV_SHARE = 128, 4
WHOLE = 32
"""Layers of Llama 3.1 8B."""
_INITIAL = 0.02


def save_model(tokenizer_of: str, hidden: int, layers: int, vocabulary: int, shard_size: str, folder: Path) -> None:
    """Writes the source, a piece of a tensor in memory at a time."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=max(1, hidden // HEAD_DIM // KV_SHARE),
        head_dim=HEAD_DIM,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.manual_seed(0)
    layout = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}

    def pieces(name: str) -> Iterator[Tensor]:
        for piece in torch.empty(layout[name].numel(), dtype=torch.bfloat16, device="meta").split(PIECE):
            made = torch.ones(len(piece)) if "norm" in name else torch.randn(len(piece)) * _INITIAL
            yield made.to(torch.bfloat16)

    folder.mkdir()
    writer = ShardWriter(folder, layout, shard_size)
    for file in writer.files:
        writer.write(file, pieces)
    writer.write_index()
    config.save_pretrained(folder)
    locate(tokenizer_of).tokenizer().save_pretrained(folder)


def convert(folder: Path, output: Path, tokens: int, rank: int, rotary: int, calibration: str | None) -> dict[str, Any]:
    """Converts in this process: the plan, and what it came to."""
    started, source = time.monotonic(), open_source(str(folder))
    recipe = make_recipe(
        source=str(folder),
        output=output,
        kv_lora_rank=rank,
        qk_rope_head_dim=rotary,
        tokens=tokens,
        calibration=calibration,
    )
    plan, progress = make_plan(recipe, source), Progress(console=Console(quiet=True), disable=True)
    done = run_plan(plan, source, progress)
    return {
        "layers": source.num_layers,
        "parameters": plan.parameters,
        "cache": plan.cache_bytes / plan.source_cache_bytes,
        "windows": plan.windows,
        "expected": plan.costs,
        "seconds": time.monotonic() - started,
        "memory": peak_memory(),
        "disk": done.disk_bytes,
        "stages": durations(progress),
    }


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a stage, and one for all."""
    layers, whole, total = found["layers"], 0.0, found["seconds"]
    stages = found["stages"] | {"other": total - sum(found["stages"].values())}
    rows = []
    for name, seconds in stages.items():
        growth = (WHOLE / layers) ** (2 if name == "weighing" else 1)
        scaled = seconds if name == "other" else seconds * growth
        whole += scaled
        rows.append(_row(name, seconds, total, layers, scaled))
    return [*rows, _row("all", total, total, layers, whole)]


def _row(stage: str, seconds: float, total: float, layers: int, scaled: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "seconds": round(seconds, 1),
        "share": f"{seconds / total:.0%}",
        "seconds a layer": round(seconds / layers, 1),
        f"{WHOLE} layers, minutes": round(scaled / 60, 1),
    }


def main(
    model: Annotated[str, typer.Argument(help="Whose tokenizer to use.")],
    hidden: Annotated[int, typer.Option(help="Width of the model, a multiple of 512.")] = 4096,
    layers: Annotated[int, typer.Option(help="Of the source.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Words, at least those of the tokenizer.")] = 128256,
    shard: Annotated[str, typer.Option(help="Size of the source's shards.")] = "1GB",
    rank: Annotated[int, typer.Option(help="Of the latent. [default: an eighth of the width]")] = 0,
    rotary: Annotated[int, typer.Option(help="Width of the rotary key.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of calibration text.")] = 4096,
    calibration: Annotated[str | None, typer.Option(help="As for mla convert. [default: a shipped mix]")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the source stays, or lies already.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Converts in a process of its own; see the module."""
    # The parent must stay small: a process inherits the peak of the one that starts it.
    single = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory(dir=folder) as place, single as processes:
        source = Path(folder or place, "source")
        if not source.exists():
            processes.submit(save_model, model, hidden, layers, vocabulary, shard, source).result()
        arguments = (source, Path(place, "out"), tokens, rank or hidden // 8, rotary, calibration)
        found = processes.submit(convert, *arguments).result()
    print_rows(rows_of(found), as_json)
    console = Console(stderr=True)
    console.print(
        f"{found['parameters'] / 1e9:.2f}G parameters, {found['cache']:.1%} of the cache, {os.cpu_count()} CPUs"
    )
    console.print(
        f"took {found['seconds']:.0f} s, {found['memory'] / 2**30:.2f} GiB, {found['disk'] / 2**30:.1f} GiB of disk"
    )
    console.print(f"expected {found['expected']}")


if __name__ == "__main__":
    typer.run(main)
