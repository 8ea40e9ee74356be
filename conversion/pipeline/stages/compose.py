"""Composes the calibration text where the user wants the source to write it itself."""

from __future__ import annotations

from ...errors import CalibrationError
from ...evaluation.loading import load_model, reason_to_leave_out
from ...progress import counting
from ...text.self_written import self_written_windows
from ..job import ConversionJob
from ..runner import in_first


@in_first
def compose(job: ConversionJob) -> None:
    """Leaves the text beside the statistics that are taken on it.

    Raises:
        CalibrationError: the source, which has to be loaded whole for it, does not fit into memory.
    """
    plan = job.plan
    if not (plan.windows and plan.recipe.is_self_written) or job.measurements.has_text:
        return
    reason = reason_to_leave_out(job.source.meta_model, job.source.device, None)
    if reason is not None:
        raise CalibrationError(
            f"{job.source.location.model} is loaded whole where it writes the calibration text, and {reason}; give a "
            "text, or leave --calibration out."
        )
    with counting(job.progress, "writing text", plan.windows) as step:
        model = load_model(job.source.location, job.source.device)
        windows = self_written_windows(model, job.tokenizer, plan.window, plan.windows, plan.recipe.seed, step)
    job.measurements.write_text(windows)
