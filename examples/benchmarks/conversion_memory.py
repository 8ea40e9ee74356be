"""Peak memory of a conversion over model size and calibration size.

It grows with a layer and a shard, not with the text. Every conversion runs in a process of its own, on a random model
with the tokenizer of MODEL. Peaks are of resident memory, in MiB: before the final verification, and with it.

    python examples/benchmarks/conversion_memory.py MODEL --calibration text.txt
    python examples/benchmarks/conversion_memory.py MODEL --hidden 2048 --depths 16 --tokens 16384
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rows import print_rows
from transformers import AutoModelForCausalLM, LlamaConfig
from typing_extensions import override

from conversion.checkpoint.location import locate
from conversion.pipeline.conversion import run_plan
from conversion.planning.plan import make_plan
from conversion.progress import peak_memory
from conversion.recipe import make_recipe
from conversion.sources import open_source

HEAD_DIM = 64


class PeakProgress(Progress):
    """Notes the process's peak when a step ends."""

    def __init__(self) -> None:
        super().__init__(console=Console(quiet=True), disable=True)
        self.peaks: dict[str, int] = {}

    @override
    def stop_task(self, task_id: TaskID) -> None:
        super().stop_task(task_id)
        (task,) = (task for task in self.tasks if task.id == task_id)
        self.peaks[task.description] = peak_mebibytes()


def peak_mebibytes() -> int:
    """Largest resident size of this process so far."""
    return peak_memory() // 2**20


def save_model(tokenizer_of: str, hidden: int, layers: int, folder: Path) -> None:
    """A random Llama in bfloat16: an MLP three times as wide, heads of 64, half as many for keys and values."""
    tokenizer = locate(tokenizer_of).tokenizer()
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM // 2,
        num_hidden_layers=layers,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert(folder: Path, hidden: int, layers: int, tokens: int, calibration: str | None) -> dict[str, Any]:
    """Converts in this process, and gives one row of the table."""
    source = open_source(str(folder))
    recipe = make_recipe(
        source=str(folder),
        output=folder / f"{tokens}",
        cache="50%",
        latent_bits=16,
        tokens=tokens,
        calibration=calibration,
    )
    plan, progress = make_plan(recipe, source), PeakProgress()
    verification = run_plan(plan, source, progress).report.verification
    before, after = progress.peaks["writing"], peak_mebibytes()
    return {
        "hidden": hidden,
        "layers": layers,
        "parameters (M)": round(plan.parameters / 1e6, 1),
        "tokens": tokens,
        "converting (MiB)": before,
        "with verification (MiB)": after,
        "ratio": round(after / before, 2),
        "loaded whole": verification.whole_model is not None,
    }


def main(
    model: Annotated[str, typer.Argument(help="Whose tokenizer to use.")],
    hidden: Annotated[int, typer.Option(help="Width of the model, a multiple of 128.")] = 512,
    depths: Annotated[str, typer.Option(help="Layers, separated by commas.")] = "4,16",
    tokens: Annotated[str, typer.Option(help="Of calibration text, separated by commas.")] = "16384,65536,180224",
    calibration: Annotated[str | None, typer.Option(help="As for mla convert. [default: a shipped mix]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Converts every size in a process of its own; see the module."""
    rows = []
    # The parent must stay small: a process inherits the peak of the one that starts it.
    single = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as folder, single as processes:
        for layers in map(int, depths.split(",")):
            source = Path(folder, str(layers))
            processes.submit(save_model, model, hidden, layers, source).result()
            rows += [
                processes.submit(convert, source, hidden, layers, int(count), calibration).result()
                for count in tokens.split(",")
            ]
    print_rows(rows, as_json)


if __name__ == "__main__":
    typer.run(main)
