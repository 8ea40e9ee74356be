"""A conversion: its inputs, its stages, and what makes it another one than any before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress
from torch import Tensor

from ..devices.processes import Processes
from ..evaluation.source_outputs import SourceOutputs
from ..forward.products import fast_float32
from ..planning.plan import ConversionPlan, make_plan
from ..progress import silent_progress
from ..reporting.report import Report
from ..sources import SourceModel
from .inputs import calibration_windows, open_inputs
from .job import ConversionJob
from .runner import run_stages
from .stages.allocate import allocate
from .stages.compose import compose
from .stages.convert_layers import convert_layers
from .stages.measure import measure
from .stages.measure_again import measure_again
from .stages.preflight import preflight
from .stages.report import made_report, report
from .stages.verify import verify
from .stages.weigh import weigh
from .stages.write import write
from .work.journal import WorkFolder
from .work.measurements import SharedMeasurements
from .work.partial_output import versions

STAGES = (preflight, compose, measure, weigh, allocate, measure_again, convert_layers, write, verify, report)


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: where it lies, what its verification found, and the bytes of disk that it took at most."""

    output: Path
    report: Report
    disk_bytes: int


@fast_float32()
def run_plan(
    plan: ConversionPlan,
    source: SourceModel,
    progress: Progress | None = None,
    outputs: SourceOutputs | None = None,
) -> Conversion:
    """Converts, verifies and publishes a checkpoint.

    The output appears under its name when it is complete and verified. Until then everything is in ``.NAME.partial``
    beside it; the same call goes on from there, and gives the same bytes as an unbroken one.

    Args:
        plan: of `make_plan`.
        source: the same source; what is computed of it is on the recipe's device.
        progress: shows how far it is; by default nothing is shown.
        outputs: of the source, where several conversions of it are verified on the same text.

    Raises:
        ConversionError: see its kinds in `conversion.errors`; nothing is published.
    """
    recipe, progress = plan.recipe, progress or silent_progress()
    source = source.on(recipe.torch_device)
    processes = Processes()
    tokenizer = processes.together(open_inputs, plan, source, progress)
    windows = processes.together(calibration_windows, plan, source, tokenizer)
    work = WorkFolder(recipe.output, identity_of(plan, source, windows), source.device)
    measurements, others = work.measurements, []
    if recipe.statistics is not None and plan.windows:
        identity = _contents(plan, source, windows) | versions() | {"method": recipe.method, "seed": str(recipe.seed)}
        measurements = SharedMeasurements(recipe.statistics, identity, source.device)
        others.append(measurements)
    job = ConversionJob(plan, source, tokenizer, windows, work, measurements, progress, processes, outputs)
    disk_bytes = run_stages(job, STAGES, others)
    return Conversion(recipe.output, made_report(job), disk_bytes)


def identity_of(plan: ConversionPlan, source: SourceModel, windows: Tensor | None) -> dict[str, str]:
    """What makes a conversion another one: settings, contents of its inputs, versions of what computes.

    ``windows`` are the token ids ``[N, S]`` of the calibration text, None where there is none.
    """
    return plan.recipe.identity() | _contents(plan, source, windows) | versions() | {"device": source.device.type}


def _contents(plan: ConversionPlan, source: SourceModel, windows: Tensor | None) -> dict[str, str]:
    text = b"" if windows is None else windows.numpy().tobytes()
    tokens = hashlib.sha256(text).hexdigest()[:16]
    if plan.windows and plan.recipe.is_self_written:
        tokens = f"{plan.windows * plan.window} written by the source"
    return {"source files": source.location.fingerprint(), "calibration tokens": tokens}


__all__ = ["Conversion", "identity_of", "make_plan", "run_plan"]
