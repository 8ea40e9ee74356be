"""Healing: the converted model's attention learns to give the source's logits.

Only attention matrices are trained, by Transformers' Trainer, as they are or as LoRA by PEFT; every other tensor passes
through bit for bit. What is saved is the best state by KL on validation windows that are not trained on.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .calibration import load_windows
from .checkpoint.atomic import publishing, write_text
from .checkpoint.location import Location, locate
from .checkpoint.reader import SafetensorsReader
from .checkpoint.writer import ShardWriter
from .distillation import Pace, make_trainer
from .errors import CalibrationError, ConversionError, SourceError
from .progress import counting
from .whole_model import load_model

RATE = 4e-4
"""Step of a matrix, relative to the root mean square of its elements."""
QUERY_SHARE = 0.3
"""Of the rate, for query maps: scores depend on them more sharply."""
LORA_RATE = 5e-4
"""Absolute, for adapters, whose matrices start from zero."""
WINDOW = 512
VALIDATION_WINDOWS = 8
MAX_TOKENS = 2_000_000


@dataclass(frozen=True)
class HealingRecipe:
    """What the user asked for.

    Args:
        model: the converted checkpoint.
        teacher: the model that it was made from.
        data: as for `load_windows`.
        output: a new folder.
        minutes: of training and validation; or, for a run that can be repeated exactly,
        steps: of one window each.
        lora_rank: train adapters of this rank, merged at the end; None trains the matrices themselves.
        seed: of the order of the text and the adapters' start.
    """

    model: str
    teacher: str
    data: str
    output: Path
    minutes: float | None = None
    steps: int | None = None
    lora_rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Healed:
    """What came of it. KL(teacher || model) in nats a token, mean over the validation windows."""

    output: Path
    kl_before: float
    kl_after: float
    steps: int
    trained_parameters: int

    @property
    def improved(self) -> bool:
        return self.kl_after < self.kl_before


def heal(recipe: HealingRecipe, progress: Progress) -> Healed:
    """Trains, and publishes the best state; the input's own weights where none is better.

    Raises:
        ConversionError: a model cannot be loaded or does not fit the other, the text is too short, or the output
            exists. Nothing is published.
    """
    if (recipe.minutes is None) == (recipe.steps is None):
        raise ConversionError("give either minutes or steps.")
    with publishing(recipe.output) as folder:
        location, teacher_location = locate(recipe.model), locate(recipe.teacher)
        config = location.config()
        _refuse_unfit(recipe, config, teacher_location.config())
        tokenizer = location.tokenizer()
        window = min(WINDOW, config.max_position_embeddings)
        windows = load_windows(recipe.data, tokenizer, window, MAX_TOKENS, recipe.seed)
        if len(windows) <= VALIDATION_WINDOWS:
            raise CalibrationError(
                f"{recipe.data} has {len(windows)} windows of {window} tokens; {VALIDATION_WINDOWS} are for validation "
                "alone. Give a longer text."
            )
        model, teacher = load_model(location), load_model(teacher_location)
        reader = SafetensorsReader(location.folder)
        tensors, healed = _train(recipe, model, teacher, windows, reader, folder / "training", progress)
        shutil.rmtree(folder / "training", ignore_errors=True)
        _write(folder, location, reader, tensors, config)
        _write_report(folder, location, recipe, healed)
        tokenizer.save_pretrained(folder)
    return healed


def _refuse_unfit(recipe: HealingRecipe, config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    if not hasattr(config, "kv_lora_ranks"):
        raise SourceError(f"{recipe.model} is a {config.model_type} model; give a converted one.")
    if config.vocab_size != teacher.vocab_size:
        raise SourceError(
            f"{recipe.teacher} has a vocabulary of {teacher.vocab_size}, {recipe.model} one of {config.vocab_size}; "
            "the teacher must be the model that it was made from."
        )


def _train(
    recipe: HealingRecipe,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    reader: SafetensorsReader,
    work: Path,
    progress: Progress,
) -> tuple[dict[str, Tensor], Healed]:
    """The trained tensors under their names in the checkpoint, none where nothing improved."""
    names = trainable_names(model)
    student = _with_adapters(model, recipe) if recipe.lora_rank else _unfrozen(model, names)
    groups = _adapter_groups(student) if recipe.lora_rank else _matrix_groups(model, names)
    seconds = None if recipe.minutes is None else 60 * recipe.minutes
    unit = "steps" if recipe.steps else "seconds"
    with counting(progress, f"healing ({unit})", math.ceil(recipe.steps or seconds or 0)) as advance:
        trainer = make_trainer(
            student,
            teacher,
            groups,
            training=windows[VALIDATION_WINDOWS:],
            validation=windows[:VALIDATION_WINDOWS],
            pace=Pace(recipe.steps, seconds, advance),
            seed=recipe.seed,
            work=work,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        if recipe.lora_rank:
            model = student.merge_and_unload()
            trainer.model = model
        _round_as_stored(model, names, reader)
        after = trainer.evaluate()["eval_loss"]
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    healed = Healed(recipe.output, before, after, trainer.state.global_step, trained)
    tensors = {name: model.get_parameter(name).detach().cpu() for name in names} if healed.improved else {}
    return tensors, healed


def trainable_names(model: PreTrainedModel) -> list[str]:
    """The attention's projections: neither norms, nor anything outside of attention."""
    return [
        name
        for name, parameter in model.named_parameters()
        if ".self_attn." in name and "norm." not in name and parameter.detach().abs().max() > 0
    ]


def _unfrozen(model: PreTrainedModel, names: list[str]) -> PreTrainedModel:
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model


def _matrix_groups(model: PreTrainedModel, names: list[str]) -> list[dict[str, Any]]:
    """One group a tensor, whose rate fits its own scale."""
    groups = []
    for name in names:
        parameter = model.get_parameter(name)
        share = QUERY_SHARE if ".self_attn.q_" in name else 1.0
        rate = RATE * share * parameter.detach().square().mean().sqrt().item()
        groups.append({"params": [parameter], "lr": rate})
    return groups


def _with_adapters(model: PreTrainedModel, recipe: HealingRecipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConversionError("adapters need PEFT; install it with: pip install peft.") from error
    assert recipe.lora_rank is not None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if ".self_attn." in name]
    torch.manual_seed(recipe.seed)
    return get_peft_model(
        model, LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=targets)
    )


def _adapter_groups(student: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [parameter for parameter in student.parameters() if parameter.requires_grad], "lr": LORA_RATE}]


@torch.no_grad()
def _round_as_stored(model: PreTrainedModel, names: list[str], reader: SafetensorsReader) -> None:
    """What is measured is what will be saved."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.to(reader.dtype(name)))


def _write(
    folder: Path, location: Location, reader: SafetensorsReader, trained: dict[str, Tensor], config: PreTrainedConfig
) -> None:
    layout = {name: torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta") for name in reader.names}

    def fetch(name: str) -> Tensor:
        return trained[name].to(layout[name].dtype) if name in trained else reader.tensor(name)

    writer = ShardWriter(folder, layout)
    for file in writer.files:
        writer.write(file, fetch)
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
    versions = {name: version(name) for name in ("modeling-mla", "torch", "transformers")}
    report = {"recipe": settings, "versions": versions} | asdict(healed) | {"improved": healed.improved}
    del report["output"]
    write_text(folder / "healing.json", json.dumps(report, indent=2) + "\n")
    card = location.folder / "README.md"
    if card.is_file():
        told = (
            f"Attention distilled from {settings['teacher']} on {settings['data']}: {healed.steps} steps, seed "
            f"{recipe.seed}. Validation KL {healed.kl_before:.4f} before, {healed.kl_after:.4f} after."
            if healed.improved
            else f"Distillation on {settings['data']} did not improve the weights; they are the conversion's own."
        )
        write_text(folder / "README.md", f"{card.read_text(encoding='utf-8').rstrip()}\n\n## Healing\n\n{told}\n")


__all__ = ["Healed", "HealingRecipe", "heal", "trainable_names"]
