"""Healing: the converted model's attention learns to give the source's logits.

Only attention matrices are trained, by Transformers' Trainer, as they are or as LoRA by PEFT; every other tensor passes
through bit for bit. What is saved is the best state by KL on validation windows that are not trained on.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.atomic import refusing_full_disk, write_json, write_text
from ..checkpoint.location import Location, locate
from ..checkpoint.reader import SafetensorsReader, TensorReader
from ..checkpoint.writer import ShardWriter
from ..devices.choice import CPU, chosen_device
from ..devices.processes import Processes
from ..errors import CalibrationError, ConversionError, SourceError
from ..evaluation.accounting import kept, passed_through
from ..evaluation.loading import load_model
from ..evaluation.reference import check_reference
from ..pipeline.work.partial_output import require_absent, versions
from ..progress import counting
from ..sources import SourceModel, open_source
from ..text.windows import load_windows
from .folder import Healed, HealingFolder
from .pace import Pace, last_state
from .recipe import HealingRecipe
from .trained_parameters import round_as_stored, trainable_names, unfrozen, with_adapters
from .trainer import make_trainer

WINDOW = 512
VALIDATION_WINDOWS = 8
MAX_TOKENS = 2_000_000


def heal(recipe: HealingRecipe, progress: Progress) -> Healed:
    """Trains, and publishes the best state; the input's own weights where none is better.

    Until then everything is in ``.NAME.partial`` beside the output; the same call goes on from there, and with a number
    of steps it gives the same bytes as an unbroken one.

    Raises:
        ConversionError: a model cannot be loaded, is not what the other one was made from, or gives logits that are
            not finite; the text is too short; the training diverged; or the output exists. Nothing is published.
    """
    if (recipe.minutes is None) == (recipe.steps is None):
        raise ConversionError("give either minutes or steps.")
    device, started = chosen_device(recipe.device), Processes().count
    if started > 1:
        raise ConversionError(f"healing is done by one process, not {started}; start it without a launcher.")
    require_absent(recipe.output)
    location = locate(recipe.model)
    config, reader = location.config(), SafetensorsReader(location.folder)
    teacher = open_teacher(recipe, location, config, reader)
    tokenizer = location.tokenizer()
    window = min(WINDOW, config.max_position_embeddings)
    windows = load_windows(recipe.data, tokenizer, window, MAX_TOKENS, recipe.seed)
    if len(windows) <= VALIDATION_WINDOWS:
        raise CalibrationError(
            f"{recipe.data} has {len(windows)} windows of {window} tokens; {VALIDATION_WINDOWS} are for validation "
            "alone. Give a longer text."
        )
    folder = HealingFolder(recipe.output, _identity(recipe, location, teacher, windows) | {"device": device.type})
    with folder as work, refusing_full_disk(work.path):
        healed = work.journal.healed
        if healed is None:
            # Trainer and PEFT leave much to the default device.
            with CPU:
                healed = _train(recipe, location, teacher.on(device), windows, reader, work, progress)
        _write(work.checkpoint, location, reader, work.trained(), config)
        _write_report(work.checkpoint, location, recipe, healed)
        tokenizer.save_pretrained(work.checkpoint)
        work.publish()
    return healed


def open_teacher(
    recipe: HealingRecipe, location: Location, config: PreTrainedConfig, reader: TensorReader
) -> SourceModel:
    """The model that a converted one was made from.

    Raises:
        SourceError: the model is not converted, or the teacher another one than it was made from: of the tensors that
            no conversion touches one differs.
    """
    if not hasattr(config, "kv_lora_ranks"):
        raise SourceError(f"{recipe.model} is a {config.model_type} model; give a converted one.")
    teacher = open_source(recipe.teacher)
    if config.vocab_size != teacher.config.vocab_size:
        raise SourceError(
            f"{recipe.teacher} has a vocabulary of {teacher.config.vocab_size}, {recipe.model} one of "
            f"{config.vocab_size}; the teacher must be the model that it was made from."
        )
    for name in passed_through(teacher):
        if not kept(name, reader, teacher):
            raise SourceError(
                f"{name} of {recipe.teacher} is not that of {recipe.model}; the teacher must be the model that it was "
                "made from."
            )
    check_reference(teacher)
    return teacher


def _identity(recipe: HealingRecipe, location: Location, teacher: SourceModel, windows: Tensor) -> dict[str, str]:
    settings = {name: str(getattr(recipe, name)) for name in ("minutes", "steps", "lora_rank", "seed")}
    contents = {
        "model files": location.fingerprint(),
        "teacher files": teacher.location.fingerprint(),
        "training tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16],
    }
    return settings | contents | versions()


def _train(
    recipe: HealingRecipe,
    location: Location,
    source: SourceModel,
    windows: Tensor,
    reader: TensorReader,
    work: HealingFolder,
    progress: Progress,
) -> Healed:
    """Leaves the trained tensors in the work folder, none where nothing improved; trains on the source's device."""
    model, teacher = load_model(location, source.device), load_model(source.location, source.device)
    names = trainable_names(model)
    if recipe.lora_rank:
        student, groups = with_adapters(model, recipe.lora_rank, recipe.seed)
    else:
        student, groups = model, unfrozen(model, names)
    seconds = None if recipe.minutes is None else 60 * recipe.minutes
    unit = "steps" if recipe.steps else "seconds"
    validation = windows[:VALIDATION_WINDOWS]
    with counting(progress, f"healing ({unit})", math.ceil(recipe.steps or seconds or 0)) as advance:
        pace = Pace(recipe.steps, seconds, advance)
        trainer = make_trainer(
            student,
            teacher,
            groups,
            training=windows[VALIDATION_WINDOWS:],
            validation=validation,
            pace=pace,
            seed=recipe.seed,
            device=source.device,
            work=work.training.absolute(),
        )
        before = trainer.evaluate()["eval_loss"]
        if not math.isfinite(before):
            raise _no_numbers({recipe.teacher: teacher, recipe.model: model}, validation)
        trainer.train(resume_from_checkpoint=last_state(work.training, pace))
        if recipe.lora_rank:
            model = student.merge_and_unload()
            trainer.model = model
        round_as_stored(model, names, reader)
        after = trainer.evaluate()["eval_loss"]
    steps, trained = trainer.state.global_step, sum(tensor.numel() for group in groups for tensor in group["params"])
    if not math.isfinite(after):
        raise ConversionError(
            f"the training diverged within {steps} steps, its KL is {after}; try another seed, or adapters by --lora."
        )
    healed = Healed(kl_before=before, kl_after=after, steps=steps, trained_parameters=trained)
    tensors = {name: model.get_parameter(name).detach().cpu() for name in names} if healed.improved else {}
    work.finish_training(healed, {name: tensor.to(reader.dtype(name)) for name, tensor in tensors.items()})
    return healed


@torch.inference_mode()
def _no_numbers(models: dict[str, PreTrainedModel], windows: Tensor) -> SourceError:
    """Names the model whose logits are not finite."""
    guilty = [
        name
        for name, model in models.items()
        if not all(model(window[None], use_cache=False).logits.isfinite().all() for window in windows.to(model.device))
    ]
    return SourceError(f"{' and '.join(guilty)} gives logits that are not finite on the validation windows.")


def _write(
    folder: Path, location: Location, reader: TensorReader, trained: dict[str, Tensor], config: PreTrainedConfig
) -> None:
    layout = {name: torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta") for name in reader.names}
    writer = ShardWriter(folder, layout)
    for file in writer.files:
        writer.write(file, lambda name: [trained[name].flatten()] if name in trained else reader.pieces(name))
    writer.write_index()
    config.save_pretrained(folder)
    location.generation_config(config).save_pretrained(folder)


def _write_report(folder: Path, location: Location, recipe: HealingRecipe, healed: Healed) -> None:
    """``healing.json`` beside what the conversion told about itself, and a paragraph in the model card."""
    for file in location.folder.glob("conversion.*"):
        shutil.copy(file, folder)
    settings = asdict(recipe) | {"teacher": Location(recipe.teacher, Path(recipe.teacher)).folder.name}
    settings |= {"data": Path(recipe.data).name, "model": location.name}
    del settings["output"]
    found = healed.model_dump() | {"improved": healed.improved}
    write_json(folder / "healing.json", {"recipe": settings, "versions": versions()} | found)
    card = location.folder / "README.md"
    if card.is_file():
        told = (
            f"Attention distilled from {settings['teacher']} on {settings['data']}: {healed.steps} steps, seed "
            f"{recipe.seed}. Validation KL {healed.kl_before:.4f} before, {healed.kl_after:.4f} after."
            if healed.improved
            else f"Distillation on {settings['data']} did not improve the weights; they are the conversion's own."
        )
        write_text(folder / "README.md", f"{card.read_text(encoding='utf-8').rstrip()}\n\n## Healing\n\n{told}\n")
