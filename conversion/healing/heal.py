"""Healing: a converted model learns to do what its source does, and only what is better is published.

Attention matrices are trained, as they are or as LoRA by PEFT; every other tensor passes through bit for bit, unless
the recipe gives that up. What is saved is the best state by KL over all domains, on windows that are not learnt from.
"""

from __future__ import annotations

import hashlib

from rich.progress import Progress

from ..checkpoint.location import Location, locate
from ..checkpoint.reader import SafetensorsReader
from ..devices.choice import chosen_device
from ..devices.processes import Processes
from ..pipeline.runner import run_stages
from ..pipeline.work.partial_output import require_absent, versions
from ..sources import SourceModel
from ..text.mix import Domain, load_mix
from .folder import Healed, HealingFolder
from .job import TOKENS, HealingJob, validation_window
from .pair import open_teacher
from .publish import publish
from .recipe import HealingRecipe
from .train import compose, train

STEPS = (compose, train, publish)


def heal(recipe: HealingRecipe, progress: Progress) -> Healed:
    """Trains, and publishes the best state; the input's own weights where none is better.

    Until then everything is in ``.NAME.partial`` beside the output; the same call goes on from there, and with a number
    of steps it gives the same bytes as an unbroken one. Processes that a launcher has started learn from different
    windows of a step.

    Raises:
        ConversionError: a model cannot be loaded, is not what the other one was made from, or gives logits that are
            not finite; the text is too short; the training diverged before anything was better; or the output exists.
            Nothing is published.
    """
    device, processes = chosen_device(recipe.device), Processes()
    processes.together(require_absent, recipe.folder)
    location, source = processes.together(_open, recipe)
    config, tokenizer = location.config(), location.tokenizer()
    domains = processes.together(load_mix, recipe.texts, tokenizer, validation_window(config), TOKENS, recipe.seed)
    identity = {"model files": location.fingerprint(), "teacher files": source.location.fingerprint()}
    identity |= recipe.identity() | versions() | {"text": _digest(domains), "device": device.type}
    job = HealingJob(
        recipe=recipe,
        location=location,
        config=config,
        reader=SafetensorsReader(location.folder),
        source=source.on(device),
        tokenizer=tokenizer,
        given=domains,
        work=HealingFolder(recipe.folder, identity),
        progress=progress,
        processes=processes,
    )
    run_stages(job, STEPS)
    healed = job.work.journal.healed
    assert healed is not None
    return healed


def _open(recipe: HealingRecipe) -> tuple[Location, SourceModel]:
    location = locate(recipe.model)
    reader = SafetensorsReader(location.folder)
    return location, open_teacher(recipe.model, recipe.teacher, location.config(), reader)


def _digest(domains: list[Domain]) -> str:
    """Of what is held back of every domain, and so of the text that it was taken from."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(f"{domain.name} {domain.weight}".encode())
        digest.update(domain.validation.numpy().tobytes())
    return digest.hexdigest()[:16]
