"""What a conversion did and found, as JSON and as text, beside the weights."""

from __future__ import annotations

import io
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modeling_mla.latent_code_mla import EXACT

from ..checkpoint.atomic import write_text
from ..checkpoint.location import Location, locate
from ..evaluation.assess import Assessment
from ..evaluation.recall import Recall
from ..evaluation.verify import Verification
from ..layers import LayerBudget
from ..planning.plan import ConversionPlan
from ..sources import SourceModel
from ..text import SELF_WRITTEN
from .memory_by_context import memory_by_context
from .report_files import package_versions, read_report, write_report_files

TEXT_NAME = "conversion.txt"


@dataclass(frozen=True)
class Report:
    """A plan and its outcome.

    ``errors`` are relative squared errors of each layer's attention output on the calibration text; None where
    nothing was measured. ``sensitivity`` is the model's to each layer; empty where no ranks were moved.
    """

    plan: ConversionPlan
    location: Location
    budgets: list[LayerBudget]
    errors: list[float | None]
    sensitivity: list[float]
    verification: Verification

    def as_json(self) -> dict[str, Any]:
        """Plain values; nothing in it depends on when or how fast the conversion ran."""
        plan = self.plan.as_json()
        recipe = plan.pop("recipe") | {"source": self.location.name, "revision": self.location.revision}
        recipe["calibration"] = calibration_name(recipe["calibration"])
        del recipe["output"], recipe["statistics"]
        sensitivity: list[float] | list[None] = self.sensitivity or [None] * len(self.budgets)
        layers = [
            asdict(budget) | {"attention_output_error": error, "sensitivity": weight}
            for budget, error, weight in zip(self.budgets, self.errors, sensitivity, strict=True)
        ]
        estimates = [name for name in plan if name.startswith("estimated_")]
        return {
            "kind": "conversion",
            "recipe": recipe,
            "plan": {name: value for name, value in plan.items() if name not in (*estimates, "layers")},
            "layers": layers,
            "verification": self.verification.as_json(),
            "versions": package_versions(),
        }

    def tables(self) -> list[Table]:
        """For the terminal and the text file."""
        return [*verification_tables(self.verification), self._layer_table()]

    def _layer_table(self) -> Table:
        table = Table(title="Layers", title_justify="left")
        for column in ("layer", "latent", "rotary key", "attention output error"):
            table.add_column(column, justify="right")
        for layer, (budget, error) in enumerate(zip(self.budgets, self.errors, strict=True)):
            shown = "-" if error is None else f"{error:.4f}"
            widths = ((budget.kv_lora_rank, budget.latent_bits), (budget.qk_rope_head_dim, budget.rope_bits))
            parts = (f"{width}" if bits == EXACT else f"{width} in {bits} bits" for width, bits in widths)
            table.add_row(str(layer), *parts, shown)
        return table


def verification_tables(verification: Verification) -> list[Table]:
    """Source and converted model side by side, over all texts and text by text."""
    tables = [_summary_table(verification)]
    if len(verification.domains) > 1:
        tables.append(_domain_table(verification))
    return tables


def _domain_table(verification: Verification) -> Table:
    table = Table(title="By text", title_justify="left")
    for column in ("", "perplexity, source", "converted", "KL", "same token"):
        table.add_column(column, justify="left" if not column else "right")
    for domain in verification.domains:
        table.add_row(
            domain.text,
            f"{domain.perplexity_source:.3f}",
            f"{domain.perplexity:.3f}",
            f"{domain.kl:.4f}",
            f"{domain.top1_agreement:.1%}",
        )
    if verification.far_off:
        names = ", ".join(domain.text for domain in verification.far_off)
        table.caption = f"Far off: {names}. Calibrate on text of this kind too, or on more."
    return table


def recall_table(recall: Recall) -> Table:
    """What source and converted model find again."""
    table = Table(title=f"Recall at {recall.context} tokens, {recall.samples} samples each", title_justify="left")
    for column in ("", "source", "converted"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("needle in a haystack, numbers", f"{recall.needle_source:.0%}", f"{recall.needle:.0%}")
    table.add_row("copy of a passage, tokens", f"{recall.copy_source:.1%}", f"{recall.copy:.1%}")
    return table


def task_table(tasks: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Measures of lm-eval."""
    table = Table(title="Tasks", title_justify="left")
    for column in ("task", "measure", "source", "converted"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right")
    for task, measures in tasks.items():
        for name, values in measures.items():
            table.add_row(task, name, f"{values['source']:.4f}", f"{values['converted']:.4f}")
    return table


def _summary_table(verification: Verification) -> Table:
    v = verification
    title = f"{v.windows} windows of {v.window} tokens, {v.text}"
    table = Table(title=title, title_justify="left")
    for column in ("", "source", "converted"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("cache, bytes a token", str(v.cache_bytes_per_token_source), str(v.cache_bytes_per_token))
    table.add_row(f"bytes held for {v.window} tokens", "", str(v.cache_bytes_held))
    table.add_row("perplexity", f"{v.perplexity_source:.3f}", f"{v.perplexity:.3f}")
    table.add_row("KL to the source, nats a token", "", f"{v.kl:.4f}")
    table.add_row("same most likely token", "", f"{v.top1_agreement:.1%}")
    worst = max(range(len(v.layer_errors)), key=lambda layer: v.layer_errors[layer])
    table.add_row(f"attention output error, worst layer ({worst})", "", f"{v.layer_errors[worst]:.4f}")
    table.add_row("largest logit difference", "", f"{v.max_abs_logit_error:.2e}")
    if v.whole_model is None:
        table.caption = f"Left out is what only a whole model shows (routes, decoding, greedy tokens): {v.left_out}."
    else:
        equal = round(v.whole_model.greedy_match * v.whole_model.greedy_tokens)
        table.add_row(f"equal greedy tokens of {v.whole_model.greedy_tokens}", "", str(equal))
    return table


def write_report(report: Report, source: SourceModel, folder: Path) -> None:
    """Writes the report into the checkpoint's folder."""
    memory = memory_by_context(source, locate(str(folder)).config(), report.verification)
    write_report_files(report.as_json() | {"memory": memory}, folder)
    console = Console(file=io.StringIO(), width=100, record=True, markup=False, emoji=False)
    for table in (report.plan.table(report.location.name, costs=False), *report.tables()):
        console.print(table)
    write_text(folder / TEXT_NAME, console.export_text())


def write_verification(found: Assessment, model: Path, source: SourceModel, folder: Path, *, seed: int) -> None:
    """Writes what was found of the checkpoint in ``model`` into another folder."""
    location = locate(str(model))
    report = {"kind": "verification", "model": location.name, "against": source.location.name, "seed": seed}
    report |= {"verification": found.verification.as_json()}
    if found.recall is not None:
        report["recall"] = found.recall.as_json()
    if found.tasks:
        report["tasks"] = found.tasks
    report["memory"] = memory_by_context(source, location.config(), found.verification)
    report["versions"] = package_versions()
    write_report_files(report | {"origin": read_report(location.folder)}, folder)


def calibration_name(calibration: str | None) -> str:
    """The calibration text as others know it."""
    if calibration is None:
        # Part of it is Python's own documentation and library.
        return f"the default mix of domains, Python {sys.version_info.major}.{sys.version_info.minor}"
    if calibration == SELF_WRITTEN:
        return "text that the source wrote itself"
    return Path(calibration).name if Path(calibration).exists() else calibration
