"""The last step of a healing: the checkpoint, and what it says of how it was healed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import write_text
from ..checkpoint.writer import ShardWriter
from ..pipeline.runner import in_first
from ..reporting.card_metadata import CARD, healed_card
from ..reporting.charts import draw_healing
from ..reporting.picture_style import picture, save_png
from ..reporting.report import TEXT_NAME
from ..reporting.report_files import package_versions, read_report, write_report_files
from .folder import Healed
from .job import HealingJob

PICTURE = "healing.png"


@in_first
def publish(job: HealingJob) -> None:
    """Writes the checkpoint, with a report, the picture of the curve and a paragraph in the model card."""
    folder, reader, changed = job.work.checkpoint, job.reader, job.work.changed()
    layout = {name: torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta") for name in reader.names}
    writer = ShardWriter(folder, layout)
    for file in writer.files:
        writer.write(file, lambda name: [changed[name].flatten()] if name in changed else reader.pieces(name))
    writer.write_index()
    job.config.save_pretrained(folder)
    job.location.generation_config(job.config).save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)
    healed = job.work.journal.healed
    assert healed is not None
    _write_report(job, folder, healed)


def _write_report(job: HealingJob, folder: Path, healed: Healed) -> None:
    told = job.location.folder / TEXT_NAME
    if told.is_file():
        shutil.copy(told, folder)
    recipe = job.recipe.model_dump(mode="json", exclude={"output"})
    recipe |= {"teacher": job.source.location.name, "model": job.location.name}
    recipe["data"] = [f"{text.name}:{text.weight:g}" for text in job.recipe.texts]
    found = healed.model_dump() | {"kl_before": healed.kl_before, "kl_after": healed.kl_after}
    report = {"kind": "healing", "recipe": recipe, "versions": package_versions()} | found
    write_report_files(report | {"origin": read_report(job.location.folder)}, folder)
    draw_curve(report, folder / PICTURE)
    card = job.location.folder / CARD
    if card.is_file():
        texts = [text.name for text in job.recipe.texts]
        text = healed_card(card.read_text(encoding="utf-8"), _told(healed, recipe), texts, healed.after)
        write_text(folder / CARD, text)


def draw_curve(report: dict[str, Any], file: Path) -> None:
    """Draws the KL of every domain and their mean, as a PNG."""
    with picture(620, 400) as figure:
        axes = figure.subplots()
        draw_healing(axes, report)
        axes.set_title(report["recipe"]["model"], loc="left", pad=18)
        save_png(figure, file)


def _told(healed: Healed, recipe: dict) -> str:
    data, changed = ", ".join(recipe["data"]), "All weights" if recipe["full"] else "Attention"
    if not healed.improved:
        return f"Distillation on {data} did not improve the weights ({healed.note}); they are the conversion's own."
    rows = "\n".join(f"| {name} | {kl:.4f} | {healed.after[name]:.4f} |" for name, kl in healed.before.items())
    return (
        f"{changed} distilled from {recipe['teacher']} on {data}: {healed.steps} steps, {healed.tokens} tokens, "
        f"{healed.seconds:.0f} s, seed {recipe['seed']}. KL to the source, nats a token, on text that was not learnt "
        f"from:\n\n| domain | before | after |\n|---|---|---|\n{rows}\n"
    )
