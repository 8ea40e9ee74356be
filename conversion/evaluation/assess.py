"""``mla verify``: the verification of a checkpoint, and the measures beyond it that the user asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..checkpoint.location import locate
from ..errors import CalibrationError, VerificationError, blaming
from ..planning.text_use import window_length
from ..progress import counting
from ..sources import SourceModel
from .loading import load_model
from .recall import SAMPLES, Recall, measure_recall
from .reference import check_reference
from .tasks import evaluate_tasks
from .verify import Verification, held_out_windows, text_windows, verify_checkpoint


@dataclass(frozen=True)
class Questions:
    """What the user asks for.

    Args:
        windows: how many are read of each text at most.
        context: tokens in a window; None for 1024.
        recall: also measure what both models find again at that context.
        tasks: of lm-eval, see `evaluate_tasks`.
        limit: questions of each task; None for all.
        seed: of what recall and tasks sample.
    """

    windows: int
    context: int | None = None
    recall: bool = False
    tasks: Sequence[str] = ()
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Assessment:
    """What was found; ``recall`` and ``tasks`` where they were asked for."""

    verification: Verification
    recall: Recall | None
    tasks: dict[str, dict[str, dict[str, float]]]

    def as_json(self) -> dict[str, Any]:
        """The verification's figures, and the others under their names."""
        found = self.verification.as_json()
        if self.recall is not None:
            found["recall"] = self.recall.as_json()
        return found | ({"tasks": self.tasks} if self.tasks else {})


def assess(
    folder: Path,
    source: SourceModel,
    contents: Mapping[str, str],
    asked: Questions,
    progress: Progress,
) -> Assessment:
    """Compares the checkpoint in ``folder`` with its source.

    Args:
        folder: of the converted checkpoint.
        source: the model that it was made from.
        contents: texts by name; none for the held-out ones.
        asked: how much is read, and what is measured beyond the verification.
        progress: shows the steps.

    Raises:
        CalibrationError: the context is longer than the model's, or a text is shorter than one window.
        ConversionError: see `verify_checkpoint`, `measure_recall` and `evaluate_tasks`.
    """
    length, longest = asked.context or window_length(source), source.config.max_position_embeddings
    if length > longest:
        raise CalibrationError(f"a context of {length} tokens is beyond the model's {longest}; give a shorter one.")
    tokenizer = source.location.tokenizer()
    if contents:
        texts = {name: text_windows(text, name, tokenizer, length, asked.windows) for name, text in contents.items()}
    else:
        texts = held_out_windows(tokenizer, length, asked.windows)
    check_reference(source)
    # A damaged checkpoint may fail anywhere.
    with blaming(VerificationError, f"{folder} cannot be compared with {source.location.model}"):
        verification = verify_checkpoint(folder, source, texts, progress)
    found, scores = None, {}
    if asked.recall or asked.tasks:
        locations = {"source": source.location, "converted": locate(str(folder))}
        models = {name: load_model(location, source.device) for name, location in locations.items()}
        if asked.recall:
            with counting(progress, "recall", 2 * SAMPLES) as step:
                found = measure_recall(models["source"], models["converted"], tokenizer, length, asked.seed, step)
        if asked.tasks:
            scores = evaluate_tasks(models, tokenizer, asked.tasks, asked.limit, asked.seed)
    return Assessment(verification, found, scores)
