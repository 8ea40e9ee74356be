"""The Trainer that distils a teacher's logits, for a number of steps or of minutes."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from .scores import kl_divergence

BETAS = (0.9, 0.98)
WARM_UP = 0.05
"""Share of a run in which the rates rise; they fall as a cosine afterwards."""
LAST_RATE = 0.05
"""Of the full rate, at both ends."""
EVALUATIONS = 4
"""During training, evenly spread."""
SAVES = 3 * EVALUATIONS
"""States from which a stopped training goes on."""


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
        return float(self.steps or self.seconds or 0)

    def passed(self, step: int) -> float:
        """Steps or seconds so far."""
        return step if self.steps else self._earlier + time.monotonic() - self.started

    def rate(self, step: int) -> float:
        """What every group's rate is multiplied by."""
        share = min(self.passed(step) / self.length, 1.0)
        if share < WARM_UP:
            return max(share / WARM_UP, LAST_RATE)
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2

    def state(self) -> dict[str, Any]:
        """See `ExportableState`."""
        return {"args": {}, "attributes": {"seconds": self.passed(0) if self.seconds else 0.0, "saved": self._saved}}

    def is_over(self, state: TrainerState) -> bool:
        """Whether nothing is left to train behind a saved state."""
        return (state.global_step if self.steps else _own(state)["seconds"]) >= self.length

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._earlier, self._saved, self.started = _own(state)["seconds"], _own(state)["saved"], time.monotonic()
        self._show(state.global_step)

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
    """What `Pace.state` put there."""
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


class DistillationTrainer(Trainer):
    """Trainer whose loss, in training and in evaluation, is the divergence from a teacher."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.half = multiplies_bfloat16(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                wanted = self.teacher(**inputs, use_cache=False).logits
            outputs = model(**inputs, use_cache=False)
        loss = kl_divergence(wanted, outputs.logits)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def make_trainer(
    student: nn.Module,
    teacher: PreTrainedModel,
    groups: list[dict[str, Any]],
    *,
    training: Tensor,
    validation: Tensor,
    pace: Pace,
    seed: int,
    work: Path,
) -> DistillationTrainer:
    """A trainer that keeps the best state by validation divergence, and has it loaded when it ends.

    Args:
        groups: parameter groups of the optimizer, each with its own rate.
        training, validation: token ids ``[N, S]``.
        seed: of the order of the windows.
        work: where states are kept meanwhile, an absolute path.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=pace.steps or 10**9,
        # Evaluations and saves come when the pace says so.
        eval_strategy="steps",
        eval_steps=10**9,
        save_strategy="steps",
        save_steps=10**9,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    trainer = DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=[{"input_ids": window} for window in training],
        eval_dataset=[{"input_ids": window} for window in validation],
        callbacks=[pace],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, pace.rate)),
        teacher=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
