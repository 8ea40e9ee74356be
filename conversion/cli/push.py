"""``mla push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from ..checkpoint.paths import expanded
from ..progress import progress_for
from ..terminal import console
from .options import Quiet
from .output import command, show, show_next


def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, converted, healed or exported.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; made where it is absent.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is its owner's alone.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Replace files of the same name where the repository holds some.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go there and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Uploads a finished checkpoint to the Hub, in one commit.

    Example: mla push out me/SmolLM2-135M-Instruct-MLA --private --dry-run
    """
    from ..checkpoint.hub_upload import planned_upload, upload

    planned = planned_upload(expanded(folder), repository, private=private)
    table = Table("file")
    table.add_column("size", justify="right")
    for name, size in planned.files.items():
        table.add_row(name, decimal(size))
    table.add_row(f"{len(planned.files)} files", decimal(planned.nbytes))
    if not quiet:
        console().print(f"{folder} → {repository}, {'private' if private else 'public'}", soft_wrap=True)
        show([table])
    if dry_run:
        console().print("nothing was uploaded; without --dry-run it is.")
        return
    with progress_for(quiet=quiet) as progress:
        address = upload(planned, progress, consent=yes)
    console().print(f"{repository} is ready: {address}", soft_wrap=True)
    if not quiet:
        show_next({command("mla", "chat", repository): "loads it from the Hub"})
