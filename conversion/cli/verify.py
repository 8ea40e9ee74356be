"""``mla verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.paths import expanded
from ..progress import progress_for
from ..terminal import console
from .options import AsJson, Device, Quiet, Seed
from .output import show_either, told_in


def verify(
    output: Annotated[Path, typer.Argument(help="The converted checkpoint.")],
    against: Annotated[str, typer.Option(help="The model that it was made from.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file; may be repeated. \\[default: held-out texts]")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="At most so many of each text, from its start.")] = 32,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window. \\[default: 1024]")] = None,
    recall: Annotated[bool, typer.Option("--recall", help="Needle in a haystack and copying, at the context.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, by name, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. \\[default: all]")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.json; must not exist. \\[default: none]")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compares a converted checkpoint with its source.

    Example: mla verify out --against HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from ..checkpoint.atomic import publishing
    from ..devices.choice import chosen_device
    from ..evaluation.assess import Questions, assess
    from ..pipeline.work.partial_output import require_absent
    from ..reporting.report import recall_table, task_table, verification_tables, write_verification
    from ..sources import open_source
    from ..text.windows import read_text

    computing = chosen_device(device)
    reported = None if report is None else expanded(report)
    if reported is not None:
        require_absent(reported)
    contents = {file.name: read_text(expanded(file)) for file in text or ()}
    asked = Questions(windows, context, recall=recall, tasks=tasks.split(",") if tasks else [], limit=limit, seed=seed)
    with progress_for(quiet=quiet) as progress:
        checkpoint, source = expanded(output), open_source(against).on(computing)
        found = assess(checkpoint, source, contents, asked, progress)
    if reported is not None:
        with publishing(reported) as folder:
            write_verification(found, checkpoint, source, folder, seed=seed)
    tables = verification_tables(found.verification)
    if found.recall is not None:
        tables.append(recall_table(found.recall))
    if found.tasks:
        tables.append(task_table(found.tasks))
    show_either(found.as_json(), [] if quiet else tables, as_json=as_json)
    if as_json:
        return
    told = []
    if quiet:
        kl, same = found.verification.kl, found.verification.top1_agreement
        told.append(f"KL to the source {kl:.4f} nats a token, the same most likely token in {same:.1%} of all places.")
    if reported is not None:
        told.append(told_in(reported))
    if told:
        console().print(*told, soft_wrap=True)
