"""Makes what `check_mlx.py` runs, conversions and what Transformers says of them: ``prepare_mlx.py SOURCE FOLDER``.

Every folder ``<name>`` has the answers of Transformers and the bytes that its cache takes beside it, and its export for
mlx-lm is ``<name>-mlx``. Small models are random ones of every family that mlx-lm has a body for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from answers import TEXTS, write_answers
from transformers import AutoConfig, AutoTokenizer

from conversion import convert
from conversion.checkpoint.location import locate
from conversion.evaluation.loading import load_model
from conversion.exporters import export_checkpoint
from conversion.progress import silent_progress
from conversion.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
from tiny_families import FAMILIES, ORIGINAL, save_family
from tiny_source import write_text

LEFT_OUT = {
    "gemma2-uncapped": "mlx-lm always caps logits",
    "qwen2_moe": "mlx-lm has experts in every layer, and does not normalise what they weigh",
}
BEYOND = 2 * ORIGINAL
"""Tokens of the prompts where frequencies change with the length of a text: on the way over that length one pass over a
text is another computation than decoding it, in Transformers too."""
FIELDS = {"gemma3_text": {"final_logit_softcapping": None}}
"""As released models are, where the small models of the tests are not and mlx-lm has no such thing."""


def convert_and_export(source: str, folder: Path, **options) -> None:
    if not folder.exists():
        convert(Recipe(source=source, output=folder, **options))
    exported = folder.with_name(f"{folder.name}-mlx")
    if not exported.exists():
        export_checkpoint(str(folder), exported, "mlx", silent_progress())


def write_expected(folder: Path, prompts: list[list[int]], **options) -> None:
    if not folder.with_suffix(".json").exists():
        write_answers(folder, prompts, **options)
    config = AutoConfig.from_pretrained(folder)
    expected = {"cache_bytes_per_token": config.cache_bytes_per_token(torch.float32)}
    folder.with_suffix(".cache.json").write_text(json.dumps(expected))


def main(source: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "text.txt")
    prompts = [list(text.encode()) for text in TEXTS]
    for family in FAMILIES:
        if family in LEFT_OUT:
            continue
        small = folder / f"{family}-source"
        if not small.exists():
            save_family(small, family, dtype=torch.float32, **FIELDS.get(family, {}))
        convert_and_export(str(small), folder / family, cache="75%", calibration=str(text), tokens=512, latent_bits=16)
        longer = [(prompt * 3)[:BEYOND] for prompt in prompts]
        chosen = longer if "longrope" in family else prompts
        write_expected(folder / family, chosen, experts_implementation="eager")
    convert_and_export(source, folder / "smollm2", cache="50%", latent_bits=16, dtype="float32", tokens=8192)
    tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
    write_expected(folder / "smollm2", [tokenizer(text)["input_ids"] for text in TEXTS])
    if not (folder / "smollm2-source").exists():
        load_model(locate(source), "cpu").save_pretrained(folder / "smollm2-source")
        tokenizer.save_pretrained(folder / "smollm2-source")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
