"""Is a converted checkpoint complete, consistent with itself, and how close to its source?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modeling_mla.transformers_seams_mla import cache_argument, cache_of

from .checkpoint.location import Location, locate
from .checkpoint.reader import SafetensorsReader
from .default_texts import evaluation_texts
from .errors import CalibrationError, SourceError, VerificationError, first_line
from .products import fast_float32
from .progress import counting
from .scores import Score, Scores
from .sources import SourceModel, is_mla

WINDOW = 1024
GREEDY_TOKENS = 64
PROMPT_TOKENS = 32
DECODED_TOKENS = 8
"""Decoded one by one in the check of the cache."""
ROUTE_TOLERANCE = 1e-3
"""Between routes, and between decoding and a full forward pass, relative to the largest logit, in float32."""
_CHARACTERS_PER_TOKEN = 16
"""Upper estimate: no more of a long text is tokenised than is needed."""
FAR_OFF = 2.5
"""A text whose KL is so many times that of the closest one is reported: the calibration lacked its kind."""
_SMALL_KL = 0.01
"""Nats a token, below which no text is far off."""


@dataclass(frozen=True)
class Verification(Score):
    """What was measured, in float32: the score over all texts, and more.

    ``domains`` are the scores of each text; ``layer_errors`` the relative squared error of each layer's attention
    output where both models read the source's hidden states. ``greedy_match`` is the share of the greedy tokens before
    the first one that differs. ``route_error`` and ``decode_error`` are relative to the largest logit.
    """

    domains: tuple[Score, ...]
    layer_errors: tuple[float, ...]
    greedy_match: float
    greedy_tokens: int
    route_error: float
    decode_error: float
    tensors: int
    tensors_unchanged: int
    cache_bytes_per_token_source: int
    cache_bytes_per_token: int

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"far_off": [domain.text for domain in self.far_off]}

    @property
    def far_off(self) -> tuple[Score, ...]:
        """The texts on which the converted model is much farther from its source than on the best one."""
        limit = max(FAR_OFF * min(domain.kl for domain in self.domains), _SMALL_KL)
        return tuple(domain for domain in self.domains if domain.kl > limit)


@fast_float32()
def verify_checkpoint(
    folder: Path, source: SourceModel, texts: Mapping[str, Tensor], progress: Progress
) -> Verification:
    """Verifies the checkpoint in ``folder`` against the model that it was made from.

    Args:
        texts: token ids ``[N, S]`` of the windows of each text to measure on, by its name for the report.

    Raises:
        VerificationError: a tensor is missing, unknown, misshapen or not finite; the two routes differ; decoding
            from the cache differs from a full forward pass.
        SourceError: one of the two models cannot be loaded, or ``folder`` holds none with a latent cache.
    """
    location = locate(str(folder))
    config = location.config()
    if not is_mla(config):
        raise SourceError(f"{folder} is a {config.model_type} model without a latent cache; give a converted one.")
    converted = load_model(location)
    tensors, unchanged = check_tensors(folder, converted, source)
    reference = load_model(source.location)
    first = next(iter(texts.values()))[0]
    with torch.inference_mode():
        route_error, decode_error = check_routes(converted, first)
        with counting(progress, "verifying", sum(map(len, texts.values())) + 3) as advanced:
            scores = {}
            for name, windows in texts.items():
                scores[name] = Scores()
                for window in windows:
                    scores[name].add(reference(window[None]).logits[0], converted(window[None]).logits[0], window)
                    advanced()
            layer_errors = compare_layers(reference, converted, first)
            advanced()
            prompt = first[None, : min(PROMPT_TOKENS, len(first) // 2)]
            new_tokens = min(GREEDY_TOKENS, len(first) - prompt.shape[1])
            expected = greedy(reference, prompt, new_tokens)
            advanced()
            found = greedy(converted, prompt, new_tokens)
            advanced()
    dtype = config.dtype or torch.float32
    return Verification(
        **sum(scores.values(), Scores()).result(", ".join(texts)).as_json(),
        domains=tuple(score.result(name) for name, score in scores.items()),
        layer_errors=layer_errors,
        greedy_match=leading_match(expected, found),
        greedy_tokens=new_tokens,
        route_error=route_error,
        decode_error=decode_error,
        tensors=tensors,
        tensors_unchanged=unchanged,
        cache_bytes_per_token_source=source.cache_bytes_per_token(dtype),
        cache_bytes_per_token=config.cache_bytes_per_token(dtype),
    )


def window_length(source: SourceModel) -> int:
    """Tokens in a window: fewer than `WINDOW` where the model's context is shorter."""
    return min(WINDOW, source.config.max_position_embeddings)


def text_windows(text: str, text_name: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """The first ``count`` windows ``[<= count, length]`` of a text tokenised once, without special tokens.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    complete = min(count, len(ids) // length)
    if complete == 0:
        raise CalibrationError(
            f"{text_name} has {len(ids)} tokens, fewer than one window of {length}; give a longer text."
        )
    return torch.tensor(ids[: complete * length]).view(complete, length)


def held_out_windows(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> dict[str, Tensor]:
    """At least ``count`` windows, as many of every default domain, from text that no default calibration reads.

    A domain whose text is shorter than one window is left out.
    """
    texts = evaluation_texts(tokenizer)
    share = -(-count // len(texts))
    longest = share * length * _CHARACTERS_PER_TOKEN
    found = {}
    for name, text in texts.items():
        with suppress(CalibrationError):
            found[f"held-out {name}"] = text_windows(text[:longest], name, tokenizer, length, share)
    if not found:
        raise CalibrationError(f"no held-out text has {length} tokens; give a text of your own, or a shorter context.")
    return found


def load_model(location: Location) -> PreTrainedModel:
    """The model in float32, as any user of Transformers loads it."""
    try:
        config = location.config()
        model = AutoModelForCausalLM.from_pretrained(
            **location.arguments, config=config, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"{location.model} cannot be loaded: {first_line(error)}") from error
    return model.eval()


def check_tensors(folder: Path, model: PreTrainedModel, source: SourceModel) -> tuple[int, int]:
    """Accounts for every tensor of a checkpoint.

    Returns:
        How many there are, and how many are the source's bit for bit.

    Raises:
        VerificationError: one is missing, unknown, misshapen, not finite, loaded with another value than is stored,
            or not the source's though no conversion touches it.
    """
    reader = SafetensorsReader(folder)
    loaded = model.state_dict()
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    unknown = sorted(set(reader.names) - set(loaded))
    missing = sorted(set(loaded) - set(reader.names) - tied)
    if unknown or missing:
        raise VerificationError(f"{folder} {f'lacks {missing[0]}' if missing else f'holds unknown {unknown[0]}'}.")
    passed_through, unchanged = set(source.stored_names()), 0
    for name in reader.names:
        tensor = reader.tensor(name)
        if not torch.isfinite(tensor).all():
            raise VerificationError(f"{name} of {folder} is not finite.")
        if tensor.shape != loaded[name].shape or not torch.equal(tensor.float(), loaded[name].float()):
            raise VerificationError(f"{name} of {folder} is loaded with other values than are stored.")
        if name in passed_through and source.replaced(name) is None:
            original = source.tensors.tensor(name)
            if not torch.equal(original.to(tensor.dtype), tensor):
                raise VerificationError(f"{name} of {folder} is not the source's, though only attention is converted.")
            unchanged += original.dtype == tensor.dtype
    return len(reader.names), unchanged


def check_routes(model: PreTrainedModel, window: Tensor) -> tuple[float, float]:
    """Compares the absorbed with the expanded route, and decoding from the cache with a full forward pass.

    Args:
        window: token ids ``[S]``.

    Returns:
        The largest differences of the logits, relative to the largest logit.

    Raises:
        VerificationError: a difference is above `ROUTE_TOLERANCE`.
    """
    ids = window[None, : PROMPT_TOKENS + DECODED_TOKENS]
    prefix = ids.shape[1] - min(DECODED_TOKENS, ids.shape[1] - 1)
    logits = {}
    for route in ("expanded", "absorbed"):
        model.set_attention_route(route)
        logits[route] = model(ids).logits
    model.set_attention_route("auto")
    scale = logits["expanded"].abs().max()
    step = model(ids[:, :prefix], use_cache=True)
    decoded = [step.logits[:, -1:]]
    for position in range(prefix, ids.shape[1]):
        step = model(ids[:, position : position + 1], **cache_argument(cache_of(step)), use_cache=True)
        decoded.append(step.logits)
    full = logits["expanded"][:, prefix - 1 :]
    route_error = float((logits["absorbed"] - logits["expanded"]).abs().max() / scale)
    decode_error = float((torch.cat(decoded, dim=1) - full).abs().max() / scale)
    for what, error in (("absorbed and expanded attention", route_error), ("decoding and a full pass", decode_error)):
        if not error <= ROUTE_TOLERANCE:
            raise VerificationError(
                f"{what} differ by {error:.1e} of the largest logit; at most {ROUTE_TOLERANCE:.0e} is rounding."
            )
    return route_error, decode_error


def compare_layers(reference: PreTrainedModel, converted: PreTrainedModel, window: Tensor) -> tuple[float, ...]:
    """The relative squared error of every layer's attention output, both models reading the source's hidden states.

    Args:
        window: token ids ``[S]``.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    errors: list[float] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        inputs.append(kwargs["hidden_states"])
        outputs.append(result[0])

    def feed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"hidden_states": inputs[len(errors)]}

    def compare(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        expected = outputs[len(errors)]
        error, energy = (result[0] - expected).square().sum(), expected.square().sum()
        errors.append(float(error / energy if energy else error))

    hooks = [
        *(attention.register_forward_hook(record, with_kwargs=True) for attention in _attention(reference)),
        *(attention.register_forward_pre_hook(feed, with_kwargs=True) for attention in _attention(converted)),
        *(attention.register_forward_hook(compare, with_kwargs=True) for attention in _attention(converted)),
    ]
    try:
        for model in (reference, converted):
            model(window[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(errors)


def _attention(model: PreTrainedModel) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".self_attn")]


def greedy(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    """``[count]`` greedy continuation tokens, the end token excluded so that there are always ``count``."""
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=1,
        min_new_tokens=count,
        max_new_tokens=count,
    )
    return generated[0, prompt.shape[1] :]


def leading_match(expected: Tensor, found: Tensor) -> float:
    """The share of tokens before the first difference."""
    differing = (expected != found).nonzero()
    return 1.0 if len(differing) == 0 else float(differing[0, 0]) / len(expected)
