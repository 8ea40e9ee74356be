"""The folder of a sweep: its finished sizes, and a journal from which a stopped one goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from ..checkpoint.atomic import write_text
from ..errors import JournalError, OutputError
from ..pipeline.work.locked_folder import LockedFolder, first_difference
from ..pipeline.work.partial_output import StagedJournal
from .result import ByContext, QuantisedSource, Size

_JOURNAL = "sweep.json"


class SweepJournal(StagedJournal):
    """What was found so far.

    ``quantised_source`` is there once the source was measured, ``perplexity_source`` once a size was: on ``windows`` of
    ``window`` tokens of ``text``. ``sizes``, ``refused`` and ``timed`` are by what was asked for; the last are steps of
    the source and of the conversion, measured side by side.
    """

    quantised_source: list[QuantisedSource] | None = None
    perplexity_source: float = 0.0
    text: str = ""
    windows: int = 0
    window: int = 0
    sizes: dict[str, Size] = {}
    refused: dict[str, str] = {}
    timed: dict[str, list[ByContext]] = {}
    seconds: float = 0.0


class SweepFolder(LockedFolder):
    """The folder, as a context manager that locks it. Finished sizes stay, and others may be added to them.

    Args:
        folder: made where it is absent.
        identity: what the sizes have in common; others are refused by name.
        passing: folders that are needed until all sizes are there.

    Raises:
        JournalError: another process is using it, its journal is damaged, or it holds a sweep of something else.
        OutputError: it holds other files, or cannot be made.
    """

    def __init__(self, folder: Path, identity: dict[str, str], passing: Sequence[Path]) -> None:
        super().__init__(folder, "folder for the sweep")
        self.journal = SweepJournal(identity=identity)
        self._passing = passing
        self._since = time.monotonic()

    @override
    def open(self) -> None:
        file = self.path / _JOURNAL
        if not file.is_file():
            if any(found.suffix != ".tmp" for found in self.path.iterdir()):
                raise OutputError(f"{self.path} exists already and holds no sweep; choose another folder.")
            self.save()
            return
        found = self.read_journal(file, SweepJournal)
        different = first_difference(self.journal.identity, found.identity)
        if different is not None:
            name, other, wanted = different
            raise JournalError(
                f"{self.path} holds a sweep with {name} {other}, not {wanted}; choose another folder for this one."
            )
        # Each stage goes on from what it left, for there may be more sizes now.
        self.journal = found.model_copy(update={"finished": []})

    def save(self) -> None:
        """Writes the journal, with the time that has passed."""
        now = time.monotonic()
        self.journal.seconds += now - self._since
        self._since = now
        write_text(self.path / _JOURNAL, self.journal.model_dump_json(indent=2) + "\n")

    def has(self, cache: str, *, figures_only: bool) -> bool:
        """Whether the size ``cache`` is finished: measured, and its checkpoint there where one is wanted."""
        size = self.journal.sizes.get(cache)
        if size is None:
            return False
        return figures_only or (size.folder is not None and (self.path / size.folder).is_dir())

    def publish(self) -> None:
        """Deletes what was kept for further sizes; what stays is there already."""
        for folder in self._passing:
            shutil.rmtree(folder, ignore_errors=True)
