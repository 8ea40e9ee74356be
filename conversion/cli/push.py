"""``mla push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from ..checkpoint.paths import expanded
from ..progress import shown_progress
from ..terminal import console
from .output import show


def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, converted, healed or exported.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; made where it is absent.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is its owner's alone.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Replace files of the same name where the repository holds some.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go there and stop.")] = False,
) -> None:
    """Uploads a finished checkpoint to the Hub, in one commit."""
    from ..checkpoint.hub_upload import planned_upload, upload

    planned = planned_upload(expanded(folder), repository, private=private)
    table = Table(title=f"{folder} → {repository}, {'private' if private else 'public'}", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in planned.files.items():
        table.add_row(name, decimal(size))
    table.add_row(f"{len(planned.files)} files", decimal(planned.nbytes))
    show([table])
    if dry_run:
        console().print("nothing was uploaded; without --dry-run it is.")
        return
    with shown_progress() as progress:
        address = upload(planned, progress, consent=yes)
    console().print(f"{repository} is ready: {address}", soft_wrap=True)
