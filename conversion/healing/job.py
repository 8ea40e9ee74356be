"""One healing in progress: what its steps read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rich.progress import Progress
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoint.location import Location
from ..checkpoint.reader import SafetensorsReader
from ..devices.processes import Processes
from ..sources import SourceModel
from ..text import SELF_WRITTEN
from ..text.mix import Domain, written_domain
from .folder import HealingFolder
from .recipe import HealingRecipe

TOKENS = 2_000_000
"""Of text that is prepared; a longer training reads it again, in another order."""
_WINDOW = 512


@dataclass(frozen=True)
class HealingJob:
    """What was asked for, what it is made from, and the folder in which it is made.

    ``location``, ``config`` and ``reader`` are the converted checkpoint's, ``source`` is its teacher. ``given`` is the
    text that is there before the teacher writes any, with `window` tokens in a window of validation.
    """

    recipe: HealingRecipe
    location: Location
    config: PreTrainedConfig
    reader: SafetensorsReader
    source: SourceModel
    tokenizer: PreTrainedTokenizerBase
    given: list[Domain]
    work: HealingFolder
    progress: Progress
    processes: Processes

    @property
    def window(self) -> int:
        """Tokens in a window of validation, and of text that the teacher writes."""
        return validation_window(self.config)

    @property
    def written_share(self) -> float:
        """Of all text, what the teacher writes."""
        texts = self.recipe.texts
        return sum(text.weight for text in texts if text.spec == SELF_WRITTEN) / sum(text.weight for text in texts)

    @cached_property
    def domains(self) -> list[Domain]:
        """The text, once all of it is there."""
        if not self.written_share:
            return self.given
        return [*self.given, written_domain(self.written_share, self.work.read_text())]


def validation_window(config: PreTrainedConfig) -> int:
    """Tokens in a window by which a model of this configuration is judged."""
    return min(_WINDOW, config.max_position_embeddings)
