"""The loop that all stages of a healing go through: steps, looks at held-out text, and states to go on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..devices.processes import Processes
from ..errors import CalibrationError
from ..text.mix import Domain
from ..text.schedule import Schedule
from .clock import Clock, rate
from .folder import HealingFolder, Look
from .optimizers import Optimizers
from .pair import Pair
from .stages import Stage
from .validation import Standing, Validation, has_diverged, mean, risen

_MEMORY = 0.95
"""Of the loss that a look reports: how much of it is that of the steps before the last."""


@dataclass
class Progress:
    """How far a training is: what its state holds beside weights and optimizers.

    ``entered`` is what had passed on the clock when the stage ``stage`` began, ``step`` counts the steps of all stages
    and ``stage_step`` those of this one; ``loss`` is a running mean, ``held_out`` the stage's losses at its looks.
    """

    stage: int = 0
    entered: float = 0.0
    step: int = 0
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    look: int = 0
    loss: float | None = None
    held_out: list[float] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None


class Training:
    """Teaches a pair's student through stages.

    Args:
        pair: of models; the student's ``trained`` are what changes.
        trained: parameters by the name under which states hold them.
        groups: of the optimizers, each with its rate.
        stages: in their order.
        domains: the text.
        validation: tells how far the student is.
        before: how far it was at the start.
        clock: tells when to look and to end.
        seed: of the order of the text.
        work: where states and the best weights are kept.
        processes: each reads other windows of a step.
    """

    def __init__(
        self,
        pair: Pair,
        trained: dict[str, nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        stages: Sequence[Stage],
        domains: Sequence[Domain],
        validation: Validation,
        before: Standing,
        clock: Clock,
        seed: int,
        work: HealingFolder,
        processes: Processes,
    ) -> None:
        self.pair, self.trained, self.groups, self.stages, self.domains = pair, trained, groups, stages, domains
        self.validation, self.before, self.clock, self.seed = validation, before, clock, seed
        self.work, self.processes = work, processes
        self.at = Progress()

    def run(self) -> Progress:
        """Trains from the last state to the end, and leaves the best weights in the work folder."""
        state = self.processes.together(self.work.read_state, self.pair.device)
        if state is not None:
            self.at = Progress(**state["progress"])
            self._load(state["weights"])
            self.clock.resume(state["seconds"])
        while self.at.stage < len(self.stages) and self.at.note is None:
            self._run_stage(self.stages[self.at.stage], state)
            state = None
        self.at.seconds = self.clock.seconds
        return self.at

    def _run_stage(self, stage: Stage, state: dict[str, Any] | None) -> None:
        """A stage that ends farther from the teacher than it began is undone."""
        at, optimizers = self.at, Optimizers(self.groups, stage.rate)
        schedule = Schedule(self.domains, self._window(stage), self.seed + at.stage)
        if schedule.is_empty:
            raise CalibrationError(
                f"no text is as long as a window of stage {stage.stage}, {self._window(stage)} tokens; give a longer "
                "one, or a shorter window."
            )
        if state is None:
            at.entered, began, first = self.clock.passed(at.step), self._copy(), self._last_standing()
        else:
            optimizers.load_state_dict(state["optimizers"])
            began, first = state["began"], state["first"]
        length = (self.clock.total - at.entered) * stage.share / sum(left.share for left in self.stages[at.stage :])
        while at.note is None and not stage.is_done(at.held_out):
            passed = self.clock.passed(at.step)
            if passed >= at.entered + length:
                break
            optimizers.set_rate(rate((passed - at.entered) / length))
            self._step(stage, schedule, optimizers)
            due = self.clock.look(self.clock.passed(at.step))
            if at.note is None and due > at.look:
                at.look = due
                self._look(stage)
                self._save(optimizers, began, first)
        if at.note is None and at.stage_step and (not at.looks or at.looks[-1]["step"] != at.step):
            self._look(stage)
        if at.note is None and mean(self._last_standing()) > mean(first):
            self._load(began)
            at.looks.append(at.looks[-1] | {"kl": dict(first), "loss": None, "held_out": None})
        at.stage, at.stage_step, at.loss, at.held_out = at.stage + 1, 0, None, []

    def _window(self, stage: Stage) -> int:
        return min(stage.window, self.pair.student.config.max_position_embeddings)

    def _step(self, stage: Stage, schedule: Schedule, optimizers: Optimizers) -> None:
        at, processes = self.at, self.processes
        first = (at.stage_step * processes.count + processes.rank) * stage.batch
        windows = [schedule[first + index] for index in range(stage.batch)]
        terms: list[float] = []

        def learn(term: Tensor) -> None:
            term = term / stage.batch
            term.backward()
            terms.append(float(term.detach()))

        # One window after the other: a large vocabulary's logits of all at once are more than the model.
        with self.pair.learning(len(windows[0])):
            for window in windows:
                stage.losses(self.pair, window[None].to(self.pair.device), learn)
        gradients = {name: self._gradient(weight) for name, weight in self.trained.items()}
        summed = processes.summed(gradients | {"loss": torch.tensor(sum(terms), device=self.pair.device)})
        loss = float(summed.pop("loss")) / processes.count
        norm = torch.nn.utils.get_total_norm(summed.values())
        at.step, at.stage_step = at.step + 1, at.stage_step + 1
        at.tokens += sum(map(len, windows)) * processes.count
        if not (torch.isfinite(norm) and loss == loss):
            at.note = f"the training diverged at step {at.step}, its loss is {loss:.3g}"
            return
        for name, weight in self.trained.items():
            weight.grad = summed[name].div_(processes.count)
        optimizers.step()
        at.loss = loss if at.loss is None else _MEMORY * at.loss + (1 - _MEMORY) * loss

    def _gradient(self, weight: nn.Parameter) -> Tensor:
        """What a weight has learnt from this process's windows: nothing where they did not need it."""
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    def _look(self, stage: Stage) -> None:
        """Measures the student, and keeps its weights where they are the best so far."""
        at, standing = self.at, self.validation.standing()
        look = Look(
            stage=stage.stage,
            step=at.step,
            tokens=at.tokens,
            seconds=self.clock.seconds,
            kl=dict(standing),
            loss=at.loss,
            held_out=self.validation.held_out(stage) if stage.ends_early else None,
        )
        if math.isfinite(mean(standing)):
            # No report can hold what is no number.
            at.looks.append(look.model_dump())
        if look.held_out is not None:
            at.held_out.append(look.held_out)
        if has_diverged(self.before, standing):
            at.note = f"the training diverged by step {at.step}, its KL is {mean(standing):.3g}"
            return
        best = self.processes.from_first(self.work.best_look)
        if not risen(self.before, standing) and mean(standing) < mean(self.before if best is None else best.kl):
            self.processes.from_first(lambda: self.work.write_best(self._copy(), look))

    def _last_standing(self) -> Standing:
        return self.at.looks[-1]["kl"] if self.at.looks else self.before

    def _save(self, optimizers: Optimizers, began: dict[str, Tensor], first: Standing) -> None:
        state = {
            "progress": vars(self.at),
            "seconds": self.clock.seconds,
            "weights": self._copy(),
            "optimizers": optimizers.state_dict(),
            "began": began,
            "first": dict(first),
        }
        self.processes.from_first(self.work.write_state, state)

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().to("cpu", copy=True) for name, weight in self.trained.items()}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        load_weights(self.trained, tensors)


@torch.no_grad()
def load_weights(trained: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Gives parameters the values of tensors of the same names."""
    for name, weight in trained.items():
        weight.copy_(tensors[name])
