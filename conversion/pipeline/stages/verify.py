"""Verifies the checkpoint against its source on held-out text, before anybody sees it."""

from __future__ import annotations

from ...checkpoint.location import locate
from ...evaluation.agreement import refuse_contradiction
from ...evaluation.verify import Verification, held_out_windows, verify_checkpoint
from ...planning.costs import PROCESS_BYTES
from ...planning.text_use import VERIFIED_WINDOWS, window_length
from ..job import ConversionJob


def verify(job: ConversionJob) -> None:
    """Leaves what was found in the journal.

    Raises:
        VerificationError: it contradicts what the method promises.
    """
    texts = held_out_windows(job.tokenizer, window_length(job.source), VERIFIED_WINDOWS)
    # A whole model may take as much as the conversion did.
    allowed = job.plan.costs.memory_bytes - PROCESS_BYTES
    found = verify_checkpoint(job.work.checkpoint, job.source, texts, job.progress, allowed, job.outputs)
    job.work.journal.verification = found
    job.processes.from_first(_refuse_contradiction, job, found)


def _refuse_contradiction(job: ConversionJob, found: Verification) -> None:
    rounded = job.plan.recipe.torch_dtype is not None or locate(str(job.work.checkpoint)).config().o_bias
    refuse_contradiction(
        found,
        lossless=job.method.lossless,
        rounded_to=job.plan.dtype if rounded else None,
        vocabulary=job.source.config.vocab_size,
        routed=job.source.chooses_experts,
    )
