"""One sweep in progress: what its stages read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoint.location import Location
from ..devices.processes import Processes
from ..evaluation.decode_speed import decode_milliseconds
from ..evaluation.loading import load_model, reason_to_leave_out
from ..evaluation.source_outputs import SourceOutputs
from ..evaluation.verify import held_out_windows
from ..planning.plan import ConversionPlan
from ..planning.text_use import VERIFIED_WINDOWS, window_length
from ..reporting.cache_size import CacheMemory, cache_memory
from ..sources import SourceModel
from .folder import SweepFolder
from .recipe import SweepRecipe
from .result import CONTEXTS, ByContext


@dataclass(frozen=True)
class SweepJob:
    """What was asked for, the plans by size, and the folder in which all of them are made."""

    recipe: SweepRecipe
    plans: dict[str, ConversionPlan]
    source: SourceModel
    tokenizer: PreTrainedTokenizerBase
    work: SweepFolder
    progress: Progress
    processes: Processes
    outputs: SourceOutputs = field(default_factory=SourceOutputs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are written."""
        return next(iter(self.plans.values())).dtype

    @cached_property
    def texts(self) -> dict[str, Tensor]:
        """Token ids of the held-out windows by text, as the verification of a conversion reads them."""
        return held_out_windows(self.tokenizer, window_length(self.source), VERIFIED_WINDOWS)

    def cache_memory(self, config: PreTrainedConfig) -> CacheMemory:
        """What such a model caches: the source in its own type, a checkpoint in that of its weights."""
        is_source = config is self.source.config
        return replace(cache_memory(config), dtype=self.source.cache_dtype if is_source else self.dtype)

    def decode_speeds(self, converted: Location, config: PreTrainedConfig) -> list[ByContext] | None:
        """Milliseconds of a step by context, of the source and of a checkpoint of it, side by side in ``dtype``.

        None where the source is not loaded whole.
        """
        if reason_to_leave_out(self.source.meta_model, self.source.device, None) is not None:
            return None
        models = [load_model(one, self.source.device, self.dtype) for one in (self.source.location, converted)]
        memories = [self.cache_memory(one) for one in (self.source.config, config)]
        return decode_milliseconds(models, CONTEXTS, lambda tokens: sum(memory.bytes_at(tokens) for memory in memories))


def by_context(memory: CacheMemory, besides: int = 0) -> dict[str, int]:
    """Bytes that one sequence caches, those ``besides`` what grows with it included."""
    return {str(context): memory.bytes_at(context) + besides for context in CONTEXTS}
