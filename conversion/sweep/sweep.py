"""A sweep as a list of stages."""

from __future__ import annotations

from rich.progress import Progress

from ..devices.processes import Processes
from ..pipeline.conversion import identity_of
from ..pipeline.inputs import calibration_windows
from ..pipeline.runner import run_stages
from ..planning.plan import ConversionPlan
from ..progress import silent_progress
from ..reporting.report_files import JSON_NAME
from ..sources import SourceModel
from .convert_sizes import convert_sizes
from .folder import SweepFolder
from .job import SweepJob
from .measure_source import measure_source
from .recipe import SweepRecipe
from .report import report
from .result import SweepResult

STAGES = (measure_source, convert_sizes, report)


def run_sweep(
    recipe: SweepRecipe, plans: dict[str, ConversionPlan], source: SourceModel, progress: Progress | None = None
) -> SweepResult:
    """Converts a model to several sizes, which share one calibration, and reports what each costs and loses.

    Finished sizes are kept: the same call goes on with the others, and one with more sizes adds them.

    Args:
        recipe: what to convert, where to, and how.
        plans: of `SweepRecipe.plans`.
        source: the same source.
        progress: shows how far it is; by default nothing is shown.

    Raises:
        ConversionError: as for a conversion; or the folder holds another sweep.
    """
    progress, processes = progress or silent_progress(), Processes()
    source = source.on(recipe.any.torch_device)
    tokenizer = processes.together(source.location.tokenizer)
    plan = next(iter(plans.values()))
    windows = processes.together(calibration_windows, plan, source, tokenizer)
    # The cache is what they differ in.
    identity = {name: value for name, value in identity_of(plan, source, windows).items() if name != "cache"}
    work = SweepFolder(recipe.folder, identity, recipe.passing)
    job = SweepJob(recipe, plans, source, tokenizer, work, progress, processes)
    run_stages(job, STAGES)
    written = recipe.folder / JSON_NAME
    return SweepResult.model_validate_json(processes.from_first(written.read_text, encoding="utf-8"))
