"""The steps of a healing that compute: text that the teacher writes, and the training itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..devices.choice import CPU
from ..devices.freed_memory import keeping_freed_memory
from ..errors import CalibrationError, ConversionError, SourceError
from ..evaluation.loading import load_model, reason_to_leave_out
from ..pipeline.runner import in_first
from ..progress import counting
from ..text.mix import VALIDATION_WINDOWS, beginnings
from ..text.self_written import self_written_windows
from .clock import Clock
from .folder import Healed, Look
from .job import HealingJob
from .mlp_ridge import WINDOWS, mlp_out_names, solve_mlp_out
from .pair import Pair, load_pair
from .trained_parameters import pace, round_as_stored, trainable_names, unfrozen, with_adapters
from .training import Progress, Training, load_weights
from .validation import Standing, Validation, mean, risen

_OPENING = 32
"""Tokens of another text that the teacher goes on from."""
_WRITTEN = 128
"""Windows that the teacher writes at most: writing takes longer than learning, and they may be learnt from again."""


@in_first
def compose(job: HealingJob) -> None:
    """Leaves the text that the teacher writes in the work folder, where the recipe asks for it.

    Raises:
        CalibrationError: the teacher cannot be loaded whole.
    """
    if not job.written_share:
        return
    reason = reason_to_leave_out(job.source.meta_model, job.source.device, None)
    if reason is not None:
        raise CalibrationError(f"{job.recipe.teacher} shall write text, and {reason}; leave self out of the data.")
    count = min(_WRITTEN, VALIDATION_WINDOWS + (job.recipe.steps or _WRITTEN))
    openings = beginnings(job.given, job.window, count)[:, :_OPENING]
    with counting(job.progress, "writing text", len(openings)) as step:
        model = load_model(job.source.location, job.source.device)
        windows = self_written_windows(model, job.tokenizer, job.window, len(openings), job.recipe.seed, step, openings)
    job.work.write_text(windows)


def train(job: HealingJob) -> None:
    """Leaves what was changed in the work folder, nothing where nothing improved."""
    # PEFT leaves much to the default device.
    with CPU:
        healed, changed = _trained(job)
    job.processes.from_first(job.work.finish_training, healed, changed)


def _trained(job: HealingJob) -> tuple[Healed, dict[str, Tensor]]:
    recipe, processes = job.recipe, job.processes
    ridged = mlp_out_names(job.reader.names, recipe.model) if "mlp-out" in recipe.also else []
    pair = processes.together(load_pair, job.location, job.source, None if recipe.full else ridged)
    model: Any = pair.student
    names = [name for name, _ in model.named_parameters()] if recipe.full else trainable_names(model)
    changing = list(dict.fromkeys((*names, *ridged)))
    stored = set(job.reader.names)
    absent = next((name for name in changing if name not in stored), None)
    if absent is not None:
        raise ConversionError(
            f"{absent} of {recipe.model} is stored in several parts, which full cannot write; leave it out."
        )
    validation = Validation(job.domains, pair, processes)
    before = validation.standing()
    if not math.isfinite(mean(before)):
        raise _no_numbers(job, pair)
    if ridged:
        _solve(job, pair, ridged, validation, before)
    adapted = None
    if recipe.lora_rank:
        adapted, trained, groups = with_adapters(model, recipe.lora_rank, recipe.seed)
    else:
        trained, groups = unfrozen(model, names)
    done = _train(job, pair, trained, groups, validation, before)
    best = processes.from_first(job.work.best_look)
    if best is None and done.note is not None:
        raise ConversionError(f"{done.note}, before anything was better; try another seed, or adapters by --lora.")
    if best is not None:
        load_weights(trained, processes.together(job.work.read_best))
    if adapted is not None:
        model = adapted.merge_and_unload()
    with torch.no_grad():
        round_as_stored(model, changing, job.reader)
    after = validation.standing()
    worse = risen(before, after)
    improved = mean(after) < mean(before) and not worse
    note = done.note
    if not improved:
        reason = (
            f"{', '.join(worse)} would end farther from the teacher" if worse else "nothing came closer to the teacher"
        )
        note = f"{note}; {reason}" if note else reason
    healed = Healed(
        before=dict(before),
        after=dict(after if improved else before),
        improved=improved,
        steps=done.step,
        tokens=done.tokens,
        seconds=done.seconds,
        trained_parameters=sum(weight.numel() for weight in trained.values()),
        note=note,
        looks=[Look(**look) for look in done.looks],
    )
    changed = {name: model.get_parameter(name).detach().cpu() for name in changing} if improved else {}
    return healed, {name: tensor.to(job.reader.dtype(name)) for name, tensor in changed.items()}


def _train(
    job: HealingJob,
    pair: Pair,
    trained: dict[str, nn.Parameter],
    groups: list[dict[str, Any]],
    validation: Validation,
    before: Standing,
) -> Progress:
    recipe, factor = job.recipe, pace(mean(before))
    for group in groups:
        group["lr"] *= factor
    seconds = None if recipe.minutes is None else 60 * recipe.minutes
    unit = "seconds" if recipe.steps is None else "steps"
    whole = math.ceil(recipe.steps or seconds or 0)
    with counting(job.progress, f"healing ({unit})", whole) as advance, keeping_freed_memory():
        return Training(
            pair,
            trained,
            groups,
            stages=recipe.stages,
            domains=job.domains,
            validation=validation,
            before=before,
            clock=Clock(recipe.steps, seconds, advance, job.processes),
            seed=recipe.seed,
            work=job.work,
            processes=job.processes,
        ).run()


def _solve(job: HealingJob, pair: Pair, names: list[str], validation: Validation, before: Standing) -> None:
    """Solves the matrices behind the MLPs, and takes them back where a domain is the worse for it."""
    model = pair.student
    own = {name: model.get_parameter(name).detach().clone() for name in names}
    windows = torch.cat([domain.windows(job.window)[: WINDOWS // len(job.domains)] for domain in job.domains])
    with counting(job.progress, "solving mlp-out", len(names)) as step:
        solve_mlp_out(pair, names, windows, step)
    after = validation.standing()
    if risen(before, after) or not mean(after) < mean(before):
        load_weights({name: model.get_parameter(name) for name in names}, own)


@torch.inference_mode()
def _no_numbers(job: HealingJob, pair: Pair) -> SourceError:
    """Names the model whose logits are not finite."""
    models = {job.recipe.teacher: pair.teacher, job.recipe.model: pair.student}
    windows = [window.to(pair.device) for domain in job.domains for window in domain.validation]
    guilty = [
        name
        for name, model in models.items()
        if not all(model(window[None], use_cache=False).logits.isfinite().all() for window in windows)
    ]
    return SourceError(f"{' and '.join(guilty)} gives logits that are not finite on the validation windows.")
