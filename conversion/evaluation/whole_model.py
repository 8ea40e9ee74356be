"""What only a whole model shows: both routes agree, decoding agrees with a full pass, greedy text is the source's.

Models are loaded as any user of Transformers loads them, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_mla.cache_mla import LatentCache
from modeling_mla.configuration_mla import is_coded
from modeling_mla.latent_code_mla import EXACT
from modeling_mla.transformers_seams_mla import cache_argument

from ..checkpoint.location import Location
from ..checkpoint.model_reader import as_held
from ..checkpoint.reader import SafetensorsReader
from ..errors import VerificationError
from ..sources import SourceModel
from .continuations import PROMPT_TOKENS, Continuation, greedy, prompts_of, side_by_side
from .loading import load_model
from .reference import refuse_other_tensors
from .source_outputs import SourceOutputs

DECODED_TOKENS = 8
"""Decoded one by one in the check of the cache."""
ROUTE_TOLERANCE = 1e-3
"""Between routes, and between decoding and a full forward pass, relative to the largest logit, in float32."""
STEPS = 3


@dataclass(frozen=True)
class WholeModel:
    """What was measured on whole models.

    ``greedy_match`` is the share of the ``greedy_tokens`` of all ``continuations`` before the first one of each that
    differs from the source's; ``route_error`` and ``decode_error`` are relative to the largest logit.
    """

    greedy_match: float
    greedy_tokens: int
    route_error: float
    decode_error: float
    continuations: tuple[Continuation, ...]


@torch.inference_mode()
def check_whole_model(
    converted: Location,
    source: SourceModel,
    names: Sequence[str],
    windows: Tensor,
    step: Callable[[], None],
    outputs: SourceOutputs | None = None,
) -> WholeModel:
    """Measures what only whole models show, and loads one of the two after the other.

    Args:
        converted: the converted checkpoint.
        source: the model that it was made from.
        names: of some texts.
        windows: the first one of each, token ids ``[N, S]``.
        step: called ``STEPS`` times.
        outputs: as of `verify_checkpoint`; a source whose continuations are known is not loaded.

    Raises:
        VerificationError: a tensor is loaded with other values than are stored, the two routes differ, or decoding
            from the cache differs from a full forward pass.
        SourceError: one of the models cannot be loaded, or the source has other tensors than were converted.
    """
    tokenizer = source.location.tokenizer()
    prompts, new_tokens = prompts_of(windows)
    model = load_model(converted, source.device)
    check_loaded(converted, model)
    route_error, decode_error = check_routes(model, windows[0])
    step()
    found = greedy(model, prompts, new_tokens)
    step()
    # One at a time is in memory.
    del model
    known = None if outputs is None else outputs.continued(prompts)
    expected = _continued(source, prompts, new_tokens) if known is None else known
    if outputs is not None:
        outputs.keep_continued(prompts, expected)
    step()
    continuations = side_by_side(names, prompts, expected, found, tokenizer)
    equal, tokens = sum(continuation.equal_tokens for continuation in continuations), found.numel()
    return WholeModel(equal / tokens, tokens, route_error, decode_error, continuations)


def _continued(source: SourceModel, prompts: Tensor, new_tokens: int) -> Tensor:
    reference = load_model(source.location, source.device)
    refuse_other_tensors(source, reference.named_parameters())
    return greedy(reference, prompts, new_tokens)


def check_loaded(location: Location, model: PreTrainedModel) -> None:
    """Raises `VerificationError` where ``model`` has a tensor with other values than are stored."""
    reader, loaded = as_held(SafetensorsReader(location.folder), model), model.state_dict()
    for name in reader.names:
        if name not in loaded or not torch.equal(reader.tensor(name).float(), loaded[name].cpu()):
            raise VerificationError(f"{name} of {location.model} is loaded with other values than are stored.")


def check_routes(model: PreTrainedModel, window: Tensor) -> tuple[float, float]:
    """Compares the absorbed with the expanded route, and decoding from the cache with a full forward pass.

    Both read the token ids ``window [S]``, or as many of them as the checks need, and cache nothing in few bits: a
    difference in rounding may move a value to the next level of its code. So from a coded cache decoding may differ
    from a full pass by as much as the code changes.

    Returns:
        The largest differences of the logits, relative to the largest logit.

    Raises:
        VerificationError: a difference is above `ROUTE_TOLERANCE`, or in a coded cache above that of the code.
    """
    ids = window[None, : PROMPT_TOKENS + DECODED_TOKENS].to(model.device)
    prefix = ids.shape[1] - min(DECODED_TOKENS, ids.shape[1] - 1)
    logits = {}
    for route in ("expanded", "absorbed"):
        model.set_attention_route(route)
        logits[route] = _logits(model, ids, LatentCache(config=model.config, latent_bits=EXACT))
    model.set_attention_route("auto")
    full = logits["expanded"]
    route_error = _difference(logits["absorbed"], full)
    decode_error = _difference(_decoded(model, ids, prefix, LatentCache(config=model.config, latent_bits=EXACT)), full)
    for what, error in (("absorbed and expanded attention", route_error), ("decoding and a full pass", decode_error)):
        _refuse_beyond(ROUTE_TOLERANCE, what, error)
    if is_coded(model.config):
        coded = _logits(model, ids, LatentCache(config=model.config))
        decoded = _decoded(model, ids, prefix, LatentCache(config=model.config))
        limit = ROUTE_TOLERANCE + 2 * _difference(coded, full)
        _refuse_beyond(limit, "decoding from codes and a full pass", _difference(decoded, coded))
    return route_error, decode_error


def _logits(model: PreTrainedModel, ids: Tensor, cache: LatentCache) -> Tensor:
    # A configuration that asks for attention weights would rule the absorbed route out.
    return model(ids, **cache_argument(cache), use_cache=True, output_attentions=False).logits


def _decoded(model: PreTrainedModel, ids: Tensor, prefix: int, cache: LatentCache) -> Tensor:
    """As `_logits`, with all tokens behind the first ``prefix`` decoded one by one."""
    parts = ids.split([prefix] + [1] * (ids.shape[1] - prefix), dim=1)
    return torch.cat([_logits(model, part, cache) for part in parts], dim=1)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest one, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def _refuse_beyond(limit: float, what: str, error: float) -> None:
    if not error <= limit:
        raise VerificationError(f"{what} differ by {error:.1e} of the largest logit; at most {limit:.0e} is rounding.")
