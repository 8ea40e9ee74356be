"""How long a distillation is, by steps or by the clock, and from which of its states a stopped one goes on."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from typing_extensions import override

WARM_UP = 0.05
"""Share of a run in which the learning rates rise; they fall as a cosine afterwards."""
LAST_RATE = 0.05
"""Share of the full rate at both ends of a run."""
EVALUATIONS = 4
"""Evaluations during a training, evenly spread."""
SAVES = 3 * EVALUATIONS
"""States that a training saves, evenly spread; a stopped one goes on from the last."""


@dataclass
class Pace(TrainerCallback, ExportableState):
    """How long a run is: by steps, or by the clock, which starts when this is made and is saved with every state.

    Args:
        steps: how many; or
        seconds: how long.
        advance: called with the number of steps or seconds that have passed since the last call.
    """

    steps: int | None
    seconds: float | None
    advance: Callable[[int], None]
    started: float = field(default_factory=time.monotonic)
    _earlier: float = 0.0
    _shown: int = 0
    _saved: int = 0

    @property
    def length(self) -> float:
        """All steps or seconds of the run."""
        return float(self.steps or self.seconds or 0)

    def passed(self, step: int) -> float:
        """Steps or seconds so far."""
        return step if self.steps else self._earlier + time.monotonic() - self.started

    def rate(self, step: int) -> float:
        """What the learning rate of every parameter group is multiplied by."""
        share = min(self.passed(step) / self.length, 1.0)
        if share < WARM_UP:
            return max(share / WARM_UP, LAST_RATE)
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2

    @override
    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.passed(0) if self.seconds else 0.0, "saved": self._saved}}

    def is_over(self, state: TrainerState) -> bool:
        """Whether nothing is left to train behind a saved state."""
        return (state.global_step if self.steps else _own(state)["seconds"]) >= self.length

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._earlier, self._saved, self.started = _own(state)["seconds"], _own(state)["saved"], time.monotonic()
        self._show(state.global_step)

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        passed = self._show(state.global_step)
        due = math.floor(SAVES * passed / self.length)
        control.should_save = due > self._saved
        control.should_evaluate = due // (SAVES // EVALUATIONS) > self._saved // (SAVES // EVALUATIONS)
        self._saved = due
        control.should_training_stop = passed >= self.length
        return control

    def _show(self, step: int) -> float:
        passed = min(self.passed(step), self.length)
        if int(passed) > self._shown:
            self.advance(int(passed) - self._shown)
            self._shown = int(passed)
        return passed


def _own(state: TrainerState) -> dict[str, Any]:
    """What `Pace.state` put into the Trainer's state."""
    return state.stateful_callbacks[Pace.__name__]["attributes"]


def last_state(folder: Path, pace: Pace) -> Path | None:
    """The last state in the Trainer's ``folder`` from which training goes on.

    What a kill left half-written is deleted, and so is a state behind which nothing is left to train: the Trainer would
    train one step more. The one before it leads to the same.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        # The last of its files.
        with suppress(OSError, ValueError, TypeError):
            if not pace.is_over(TrainerState.load_from_json(path / TRAINER_STATE_NAME)):
                return path
        shutil.rmtree(path)
    return None
