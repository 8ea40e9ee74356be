"""Tasks of lm-eval, source and converted model side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConversionError


def evaluate_tasks(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Runs tasks on every model.

    Args:
        models: by name.
        tokenizer: of all of them.
        tasks: names that lm-eval knows, or YAML files of tasks in its format.
        limit: questions of each task; None for all.
        seed: of what the tasks sample.

    Returns:
        ``result[task][measure][model]``; measures as lm-eval names them, its standard errors left out.

    Raises:
        ConversionError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConversionError(
            f"--tasks needs the package lm-eval ({error}); install it by: pip install 'modeling-mla[eval]'."
        ) from error
    files = [Path(task) for task in tasks if Path(task).suffix == ".yaml"]
    manager = TaskManager(include_path=[str(folder) for folder in {file.resolve().parent for file in files}] or None)
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConversionError(f"lm-eval has no task {unknown[0]!r}; list them by: lm-eval ls tasks.")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model_name, model in models.items():
        try:
            results: Any = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
                tasks=names,
                task_manager=manager,
                limit=limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        except Exception as error:
            # The data of a task comes from anywhere; whatever fails, the user needs the name and the reason.
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ConversionError(f"tasks {', '.join(names)} cannot be run: {reason[0]}") from error
        for task, measures in results["results"].items():
            for name, value in measures.items():
                if isinstance(value, float) and "stderr" not in name:
                    found.setdefault(task, {}).setdefault(name.removesuffix(",none"), {})[model_name] = value
    return found
