"""Looks for what would stop the conversion, in seconds, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import modeling_mla

from ...checkpoint.atomic import refusing_full_disk
from ...devices.choice import CPU
from ...errors import ConversionError, SourceError, first_line
from ...evaluation.reference import check_reference
from ...evaluation.verify import held_out_windows
from ...planning.exact_form import exact_config
from ...planning.text_use import VERIFIED_WINDOWS
from ...progress import counting
from ...sources import SourceModel
from ..inputs import check_ids
from ..job import ConversionJob
from ..runner import in_first

_TOKENS = 16
"""Tokens that run through the source: its weights may be finite and what they compute not."""


@in_first
def preflight(job: ConversionJob) -> None:
    """Checks all texts, the small files, generation, every weight, that the source computes, and the reference.

    Reads every weight once, a layer at a time in memory.

    Raises:
        ConversionError: the conversion cannot succeed.
    """
    source = job.source
    for text, windows in held_out_windows(job.tokenizer, job.plan.window, VERIFIED_WINDOWS).items():
        check_ids(windows, text, job.tokenizer, source)
    _try_small_files(job)
    _try_generation(source)
    with counting(job.progress, "checking", source.num_layers) as step:
        check_weights(source, job.plan.recipe.torch_dtype, step)
    check_reference(source)


def _try_small_files(job: ConversionJob) -> None:
    """Makes all that the checkpoint will have beside its weights, as the exact form would have it, and its model."""
    source = job.source.on(CPU)
    try:
        config = exact_config(source, job.plan.dtype)
        with torch.device("meta"):
            # It changes its configuration.
            getattr(modeling_mla, f"{source.mla_name}ForCausalLM")(deepcopy(config))
        # The code that travels with it is ours, not the source's: nothing of it can fail here.
        config._auto_class = None
        with TemporaryDirectory() as folder, refusing_full_disk(Path(folder)):
            config.save_pretrained(folder)
            source.location.generation_config(source.config).save_pretrained(folder)
            job.tokenizer.save_pretrained(folder)
    except ConversionError:
        raise
    except Exception as error:
        # Transformers raises many kinds where a field or a token is not what it expects.
        raise SourceError(
            f"configuration or tokenizer of {source.location.model} cannot be written again: {first_line(error)}."
        ) from error


@torch.inference_mode()
def _try_generation(source: SourceModel) -> None:
    """Generates a token by the source's defaults, with the smallest model of its family."""
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    widths = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 8)
    # A family's default for padding may lie beyond the words that there are.
    words = {field: getattr(source.config, field) for field in ("vocab_size", "pad_token_id")}
    with torch.random.fork_rng(devices=[]), CPU:
        model = source.causal_lm(type(source.config)(**sizes, **widths, **words))
    model.generation_config = source.location.generation_config(source.config)
    try:
        with CPU:
            model.generate(torch.zeros(1, 2, dtype=torch.long), do_sample=False, num_beams=1, max_new_tokens=1)
    except Exception as error:
        # Transformers checks few of the fields before it uses them.
        raise SourceError(
            f"nothing can be generated with the generation defaults of {source.location.model} "
            f"({type(error).__name__}: {first_line(error)}); correct generation_config.json."
        ) from error


@torch.inference_mode()
def check_weights(source: SourceModel, written: torch.dtype | None, step: Callable[[], None]) -> None:
    """Reads every weight, and runs a few tokens through the source in float32.

    Args:
        source: read from its files, one layer in memory.
        written: the type that all weights will have; None for their own.
        step: called after each layer.

    Raises:
        SourceError: a weight or a hidden state is not finite, or a weight is beyond ``written``.
    """
    names = source.stored_names()
    for name in names:
        if not source.in_layer(name):
            _check_range(name, source, written)
    states = source.embed(torch.arange(_TOKENS, device=CPU)[None] % source.config.vocab_size)
    for layer in range(source.num_layers):
        prefix = source.layer_prefix.format(layer=layer)
        for name in names:
            if name.startswith(prefix):
                _check_range(name, source, written)
        states = source.run_layer(layer, source.decoder_layer(layer), states)
        _require_finite(states, f"behind layer {layer}", source)
        step()
    states = source.final_norm_module()(states)
    _require_finite(states, "behind its last norm", source)
    if not states.any():
        raise SourceError(
            f"{source.location.model} computes zeros alone, so there is nothing to convert to; look for weights or "
            "configuration fields that are far too large or small."
        )


def _check_range(name: str, source: SourceModel, written: torch.dtype | None) -> None:
    # PyTorch compares no numbers of eight bits.
    pieces = (piece.float() if piece.dtype.itemsize == 1 else piece for piece in source.tensors.pieces(name))
    ends = [piece.aminmax() for piece in pieces]
    if not ends:
        return
    largest = float(torch.stack([end for both in ends for end in both]).abs().max())
    where = f"{name} of {source.location.model} holds {largest:.3g}"
    # Norms and statistics square what it makes.
    if not largest <= torch.finfo(torch.float32).max ** 0.5:
        raise SourceError(f"{where}, which, or whose square, is not finite in float32; give sound weights.")
    if written is not None and largest > torch.finfo(written).max:
        kind = str(written).removeprefix("torch.")
        raise SourceError(f"{where}, which is not finite in {kind}; choose another --dtype.")


def _require_finite(values: Tensor, where: str, source: SourceModel) -> None:
    # The next norm squares them.
    if not torch.isfinite(values.square()).all():
        raise SourceError(
            f"{source.location.model} computes values {where} that are not finite in float32, so there is nothing to "
            "convert to; look for weights or configuration fields that are far too large or small."
        )
