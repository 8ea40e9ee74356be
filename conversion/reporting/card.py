"""The model card of a converted checkpoint: how it was made, what it costs, how to load it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from ..checkpoint.atomic import write_text
from ..methods import get_method
from .card_metadata import CARD, metadata
from .report import Report, calibration_name

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def write_card(report: Report, folder: Path) -> None:
    """Writes the card into the checkpoint's folder."""
    recipe, location = report.plan.recipe, report.location
    data = metadata(location, recipe.calibration, report.verification.domains)
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        source=location.name,
        revision=location.revision,
        recipe=recipe,
        method=get_method(recipe.method),
        calibration=calibration_name(recipe.calibration),
        plan=report.plan,
        verification=report.verification,
        versions=report.as_json()["versions"],
    )
    write_text(folder / CARD, str(card).rstrip() + "\n")
