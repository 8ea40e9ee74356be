"""Runs a plan layer by layer, so that it can be killed at any time and go on later with the same result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from . import damage
from .activations import ResidualStream
from .agreement import refuse_contradiction
from .assemble import write_shards
from .calibration import load_windows
from .card import write_card
from .checkpoint.atomic import refusing_full_disk
from .checkpoint.journal import WorkFolder
from .checkpoint.measurements import IntermediateMeasurements, Measurements, SharedMeasurements
from .checkpoint.partial_output import beside
from .errors import SourceError
from .layers import AttentionWeights, LayerBudget, MLAWeights
from .methods import Method, get_method
from .methods.base import INTERMEDIATE, TwoPassMethod
from .plan import PROCESS_BYTES, VERIFIED_WINDOWS, ConversionPlan, make_plan
from .preflight import check_ids, preflight
from .products import fast_float32
from .progress import counting, silent_progress
from .reference import check_reference
from .refitting import Refitting, spread_windows
from .report import Report, calibration_name, write_report
from .sources import SourceModel
from .verify import Verification, held_out_windows, verify_checkpoint, window_length

_LAYER_SEEDS = 100_003
"""Distance between the seeds of two conversions, so that their layers share none."""

T = TypeVar("T")


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: where it lies, and what its verification found."""

    output: Path
    report: Report


class _Lazy(Sequence[T]):
    """One item a layer, loaded when it is looked at: a method may read all layers with one in memory."""

    def __init__(self, length: int, load: Callable[[int], T]) -> None:
        self._length, self._load = length, load

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._load(layer) for layer in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._load(index)


@fast_float32()
def run_plan(plan: ConversionPlan, source: SourceModel, progress: Progress | None = None) -> Conversion:
    """Converts, verifies and publishes a checkpoint.

    The output appears under its name when it is complete and verified. Until then everything is in ``.NAME.partial``
    beside it; the same call goes on from there, and gives the same bytes as an unbroken one.

    Args:
        plan: of `make_plan`.
        source: the same source.
        progress: shows how far it is; by default nothing is shown.

    Raises:
        ConversionError: see its kinds in `conversion.errors`; nothing is published.
    """
    output, progress = plan.recipe.output, progress or silent_progress()
    tokenizer = preflight(plan, source, beside(output), progress)
    check_reference(source)
    windows = _calibration_windows(plan, source, tokenizer)
    work = WorkFolder(output, _identity(plan, source, windows))
    with work, refusing_full_disk(work.path), _measurements(plan, source, windows, work) as measurements:
        run = _Run(plan, source, work, measurements, windows, progress)
        report = run.to_checkpoint(tokenizer)
        work.publish()
    return Conversion(output, report)


def _calibration_windows(
    plan: ConversionPlan, source: SourceModel, tokenizer: PreTrainedTokenizerBase
) -> Tensor | None:
    if not plan.windows:
        return None
    recipe = plan.recipe
    windows = load_windows(recipe.calibration, tokenizer, plan.window, plan.windows * plan.window, recipe.seed)
    check_ids(windows, calibration_name(recipe.calibration), tokenizer, source)
    return windows


def _identity(plan: ConversionPlan, source: SourceModel, windows: Tensor | None) -> dict[str, str]:
    """What makes a conversion another one: settings, contents of its inputs, versions of what computes."""
    return plan.recipe.identity() | _contents(source, windows) | _versions()


def _contents(source: SourceModel, windows: Tensor | None) -> dict[str, str]:
    text = b"" if windows is None else windows.numpy().tobytes()
    return {
        "source files": source.location.fingerprint(),
        "calibration tokens": hashlib.sha256(text).hexdigest()[:16],
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("modeling-mla", "torch", "transformers")}


@contextmanager
def _measurements(
    plan: ConversionPlan, source: SourceModel, windows: Tensor | None, work: WorkFolder
) -> Iterator[Measurements]:
    """Where statistics are kept: in the user's folder, to be used again, or in the work folder."""
    recipe = plan.recipe
    if recipe.statistics is None or windows is None:
        yield work.measurements
        return
    identity = _contents(source, windows) | _versions() | {"method": recipe.method, "seed": str(recipe.seed)}
    with SharedMeasurements(recipe.statistics, identity) as shared:
        yield shared


class _Run:
    """One conversion in progress; every method goes on from what the work folder holds."""

    def __init__(
        self,
        plan: ConversionPlan,
        source: SourceModel,
        work: WorkFolder,
        measurements: Measurements,
        windows: Tensor | None,
        progress: Progress,
    ) -> None:
        self.plan, self.source, self.work, self.measurements = plan, source, work, measurements
        self.windows, self.progress = windows, progress
        self.method: Method = get_method(plan.recipe.method)
        # Statistics are taken in float32, whatever is stored.
        self.weights_dtype = torch.float32 if windows is not None else None
        self.geometries = [source.geometry(layer) for layer in range(source.num_layers)]

    def to_checkpoint(self, tokenizer: PreTrainedTokenizerBase) -> Report:
        stream = None
        if self.windows is not None:
            stream = ResidualStream(self.source, self.windows, self.measurements)
            self._measure("measuring", stream, self.measurements, lambda _: None)
        budgets = self._allocate()
        with self._intermediate(budgets) as intermediate:
            self._convert(budgets, stream, intermediate)
        layers = _Lazy(self.source.num_layers, self.work.read_layer)
        config = self.source.mla_config(layers, self.plan.dtype)
        write_shards(self.source, layers, config, self.plan.recipe.torch_dtype, self.work, self.progress)
        folder = self.work.checkpoint
        config.save_pretrained(folder)
        self.source.location.generation_config(self.source.config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        verification = self._verify(tokenizer)
        rounded = self.plan.recipe.torch_dtype is not None or config.o_bias
        refuse_contradiction(
            verification,
            lossless=self.method.lossless,
            rounded_to=self.plan.dtype if rounded else None,
            vocabulary=config.vocab_size,
        )
        report = Report(self.plan, self.source.location, budgets, self.work.progress.errors, verification)
        write_report(report, folder)
        write_card(report, folder)
        return report

    def _source_weights(self, layer: int) -> AttentionWeights:
        return self.source.attention(layer, self.weights_dtype)

    def _seed(self, layer: int) -> int:
        return self.plan.recipe.seed * _LAYER_SEEDS + layer

    def _measure(
        self,
        description: str,
        stream: ResidualStream,
        measurements: Measurements,
        converted: Callable[[int], MLAWeights | None],
    ) -> None:
        """Every layer's statistics in the model whose layers' attention is ``converted``, or the source's."""
        assert self.windows is not None
        windows, done, total = len(self.windows), measurements.measured, self.source.num_layers
        with counting(self.progress, description, total * windows, done * windows) as step:
            for layer in range(done, total):
                statistics = self.method.statistics(
                    self.geometries[layer], self._source_weights(layer), self._seed(layer)
                )
                assert statistics is not None
                stream.observe_and_advance(layer, statistics.update, step, converted(layer))
                sums = statistics.tensors()
                if not all(torch.isfinite(values).all() for values in sums.values()):
                    raise SourceError(
                        f"layer {layer} of {self.source.location.model} computes values on the calibration text that "
                        "are not finite in float32; look for weights that are far too large."
                    )
                measurements.write_statistics(layer, sums)
                measurements.advance(layer + 1)

    @contextmanager
    def _intermediate(self, budgets: list[LayerBudget]) -> Iterator[Measurements | None]:
        """What the second pass of a `TwoPassMethod` measures; None of another method."""
        method, windows = self.method, self.windows
        if not isinstance(method, TwoPassMethod) or windows is None:
            yield None
            return
        widths = [budget.qk_rope_head_dim for budget in budgets]

        def converted(layer: int) -> MLAWeights:
            statistics = self.measurements.read_statistics(layer)
            return method.intermediate(self.geometries[layer], self._source_weights(layer), statistics, widths[layer])

        with IntermediateMeasurements(self.measurements, widths) as measurements:
            stream = ResidualStream(self.source, windows, measurements)
            self._measure("measuring again", stream, measurements, converted)
            yield measurements

    def _allocate(self) -> list[LayerBudget]:
        """The final budgets: the plan's, unless the method moves ranks between layers."""
        stored = self.work.budgets
        if stored is not None:
            return stored
        budgets, recipe = list(self.plan.layers), self.plan.recipe
        if self.windows is not None and self.method.allocates and recipe.kv_lora_rank is None and not recipe.uniform:
            statistics = _Lazy(len(budgets), self.measurements.read_statistics)
            weights = _Lazy(len(budgets), self._source_weights)
            harm = self._damage(self.windows, budgets)
            budgets = self.method.allocate(self.geometries, budgets, statistics, weights, harm)
        self.work.progress.budgets = [(budget.kv_lora_rank, budget.qk_rope_head_dim) for budget in budgets]
        self.work.save()
        return budgets

    def _damage(self, windows: Tensor, budgets: list[LayerBudget]) -> list[float]:
        chosen = windows[spread_windows(len(windows), damage.WINDOWS), : damage.LENGTH]
        with counting(self.progress, "weighing layers", len(budgets)) as step:
            return damage.layer_damage(
                self.source, chosen, lambda layer: self._factorise(layer, budgets[layer], None), step
            )

    def _convert(
        self, budgets: list[LayerBudget], stream: ResidualStream | None, intermediate: Measurements | None
    ) -> None:
        """Last pass: factorises every layer, and refits it on the text."""
        done, total = self.work.progress.converted, self.source.num_layers
        refitting = None
        if stream is not None:
            refitting = Refitting(self.source, stream, self.work.converted_states, self.work.contexts)
        with counting(self.progress, "converting", total, done) as step:
            for layer in range(done, total):
                weights, error = self._factorise(layer, budgets[layer], intermediate), None
                if refitting is not None:
                    source_weights = self._source_weights(layer)
                    refit = self.method.refit(self.geometries[layer], source_weights, weights)
                    weights, error = refitting.run(layer, source_weights, weights, refit)
                self.work.write_layer(layer, weights)
                self.work.progress.converted = layer + 1
                self.work.progress.errors.append(error)
                self.work.save()
                self.work.converted_states.delete(layer)
                self.measurements.forget(layer)
                step()

    def _factorise(self, layer: int, budget: LayerBudget, intermediate: Measurements | None) -> MLAWeights:
        statistics = self.measurements.read_statistics(layer) if self.method.needs_calibration else None
        if intermediate is not None:
            assert statistics is not None
            second = intermediate.read_statistics(layer)
            statistics |= {INTERMEDIATE + name: tensor for name, tensor in second.items()}
        return self.method.factorise(self.geometries[layer], self._source_weights(layer), statistics, budget)

    def _verify(self, tokenizer: PreTrainedTokenizerBase) -> Verification:
        texts = held_out_windows(tokenizer, window_length(self.source), VERIFIED_WINDOWS)
        # A whole model may take as much as the conversion did.
        allowed = self.plan.memory_bytes - PROCESS_BYTES
        return verify_checkpoint(self.work.checkpoint, self.source, texts, self.progress, allowed)


__all__ = ["Conversion", "make_plan", "run_plan"]
