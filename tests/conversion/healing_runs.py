"""Tiny converted checkpoints to heal, a small default text, and a healing of these in one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_families import save_family
from tiny_source import convert, write_text

from conversion.healing.folder import Healed
from conversion.healing.heal import heal
from conversion.healing.recipe import make_healing_recipe
from conversion.progress import silent_progress

STAGES = ({"stage": "layers", "window": 64}, {"stage": "logits", "window": 64})
LOGITS = ({"stage": "logits", "window": 64},)
DEFAULT_DOMAINS = {
    "prose": "the key of a value is the query of a latent head\n",
    "code": "def f(x):\n    return x + 1\n",
}


@contextmanager
def small_default() -> Iterator[None]:
    """Within it the default text is two short domains: reading the real one takes longer than a tiny healing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conversion.text.mix.turns", lambda tokenizer: tuple(DEFAULT_DOMAINS))
        documents = {name: [text * 60] for name, text in DEFAULT_DOMAINS.items()}
        patch.setattr("conversion.text.mix.calibration_documents", lambda name, tokenizer: documents[name])
        yield


def prepare(folder: Path, *families: str, **options: object) -> dict[str, Path]:
    """Sources in bfloat16 and compressed forms that leave much to heal, by name, and a text for all."""
    text = write_text(folder / "text.txt", length=8000)
    made = {"text": text}
    recipe = {"method": "transmla", "cache": "50%", "calibration": str(text), "tokens": 1024} | options
    for family in families:
        made[family] = save_family(folder / family, family, dtype=torch.bfloat16)
        made[f"{family}_mla"] = convert(made[family], folder / f"{family}_mla", **recipe).output
    return made


def run(checkpoints: dict[str, Path], output: Path, family: str = "llama", **settings: object) -> Healed:
    """Heals ``family``; by default on the text alone, in 40 steps of two stages."""
    if "minutes" not in settings:
        settings = {"steps": 40} | settings
    recipe = {"model": str(checkpoints[f"{family}_mla"]), "teacher": str(checkpoints[family])}
    recipe |= {"data": [str(checkpoints["text"])], "stages": STAGES, "output": output}
    return heal(make_healing_recipe(**recipe | settings), silent_progress())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes but those that hang on time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


TIMED = ("report.json", "report.html", "healing.png", "README.md")
"""They tell how long a healing took."""
