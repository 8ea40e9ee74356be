"""What a conversion did and found, as JSON and as text, beside the weights."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .checkpoint.atomic import write_text
from .checkpoint.location import Location
from .layers import LayerBudget
from .plan import ConversionPlan
from .verify import Verification

JSON_NAME = "conversion.json"
TEXT_NAME = "conversion.txt"
_PACKAGES = ("modeling-mla", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Report:
    """A plan and its outcome.

    ``errors`` are relative squared errors of each layer's attention output on the calibration text; None where
    nothing was measured.
    """

    plan: ConversionPlan
    location: Location
    budgets: list[LayerBudget]
    errors: list[float | None]
    verification: Verification

    def as_json(self) -> dict[str, Any]:
        """Plain values; nothing in it depends on when or how fast the conversion ran."""
        plan = self.plan.as_json()
        recipe = plan.pop("recipe") | {"source": self.location.name, "revision": self.location.revision}
        recipe["calibration"] = calibration_name(recipe["calibration"])
        del recipe["output"], recipe["statistics"]
        layers = [
            {
                "kv_lora_rank": budget.kv_lora_rank,
                "qk_rope_head_dim": budget.qk_rope_head_dim,
                "attention_output_error": error,
            }
            for budget, error in zip(self.budgets, self.errors, strict=True)
        ]
        estimates = [name for name in plan if name.startswith("estimated_")]
        return {
            "recipe": recipe,
            "plan": {name: value for name, value in plan.items() if name not in (*estimates, "layers")},
            "layers": layers,
            "verification": self.verification.as_json(),
            "versions": {name: version(name) for name in _PACKAGES},
        }

    def tables(self) -> list[Table]:
        """For the terminal and the text file."""
        return [verification_table(self.verification), self._layer_table()]

    def _layer_table(self) -> Table:
        table = Table(title="Layers", title_justify="left")
        for column in ("layer", "latent", "rotary key", "attention output error"):
            table.add_column(column, justify="right")
        for layer, (budget, error) in enumerate(zip(self.budgets, self.errors, strict=True)):
            shown = "-" if error is None else f"{error:.4f}"
            table.add_row(str(layer), str(budget.kv_lora_rank), str(budget.qk_rope_head_dim), shown)
        return table


def verification_table(verification: Verification) -> Table:
    """Source and converted model side by side."""
    v = verification
    title = f"{v.windows} windows of {v.window} tokens, {v.text}"
    table = Table(title=title, title_justify="left")
    for column in ("", "source", "converted"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("cache, bytes a token", str(v.cache_bytes_per_token_source), str(v.cache_bytes_per_token))
    table.add_row("perplexity", f"{v.perplexity_source:.3f}", f"{v.perplexity:.3f}")
    table.add_row("KL to the source, nats a token", "", f"{v.kl:.4f}")
    table.add_row("same most likely token", "", f"{v.top1_agreement:.1%}")
    table.add_row("largest logit difference", "", f"{v.max_abs_logit_error:.2e}")
    table.add_row(f"equal greedy tokens of {v.greedy_tokens}", "", str(round(v.greedy_match * v.greedy_tokens)))
    return table


def write_report(report: Report, folder: Path) -> None:
    """Writes the report into the checkpoint's folder."""
    write_text(folder / JSON_NAME, json.dumps(report.as_json(), indent=2) + "\n")
    console = Console(file=io.StringIO(), width=100, record=True)
    for table in (report.plan.table(report.location.name), *report.tables()):
        console.print(table)
    write_text(folder / TEXT_NAME, console.export_text())


def calibration_name(calibration: str | None) -> str:
    """The calibration text as others know it."""
    if calibration is None:
        return "default mix of prose, documentation and code"
    return Path(calibration).name if Path(calibration).exists() else calibration
