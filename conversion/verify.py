"""Is a converted checkpoint complete, consistent with itself, and how close to its source?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint.location import Location, first_line, locate
from .checkpoint.reader import SafetensorsReader
from .default_texts import evaluation_texts
from .errors import CalibrationError, SourceError, VerificationError
from .progress import counting
from .sources import SourceModel, is_mla

WINDOW = 1024
GREEDY_TOKENS = 64
PROMPT_TOKENS = 32
DECODED_TOKENS = 8
"""Decoded one by one in the check of the cache."""
ROUTE_TOLERANCE = 1e-3
"""Between routes, and between decoding and a full forward pass, relative to the largest logit, in float32."""
HELD_OUT = "held-out prose, documentation and code"
_CHARACTERS_PER_TOKEN = 16
"""Upper estimate: no more of a long text is tokenised than is needed."""
_ROWS = 128
"""Positions whose distributions over the vocabulary are formed at a time."""


@dataclass(frozen=True)
class Verification:
    """What was measured, in float32.

    Perplexities are exp of the mean negative log-likelihood over the predicted tokens of all windows; ``kl`` is the
    mean ``KL(source || converted)`` in nats a token; ``greedy_match`` the share of the greedy tokens before the first
    one that differs. ``route_error`` and ``decode_error`` are relative to the largest logit.
    """

    text: str
    windows: int
    window: int
    perplexity_source: float
    perplexity: float
    kl: float
    top1_agreement: float
    max_abs_logit_error: float
    greedy_match: float
    greedy_tokens: int
    route_error: float
    decode_error: float
    tensors: int
    tensors_unchanged: int
    cache_bytes_per_token_source: int
    cache_bytes_per_token: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_checkpoint(
    folder: Path, source: SourceModel, windows: Tensor, text_name: str, progress: Progress
) -> Verification:
    """Verifies the checkpoint in ``folder`` against the model that it was made from.

    Args:
        windows: token ids ``[N, S]`` of the text to measure on.
        text_name: what it is, for the report.

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
    with torch.inference_mode():
        route_error, decode_error = check_routes(converted, windows[0])
        with counting(progress, "verifying", len(windows) + 2) as advanced:
            scores = _Scores()
            for window in windows:
                scores.add(reference(window[None]).logits[0], converted(window[None]).logits[0], window)
                advanced()
            prompt = windows[0][None, : min(PROMPT_TOKENS, windows.shape[1] // 2)]
            new_tokens = min(GREEDY_TOKENS, windows.shape[1] - prompt.shape[1])
            expected = greedy(reference, prompt, new_tokens)
            advanced()
            found = greedy(converted, prompt, new_tokens)
            advanced()
    dtype = config.dtype or torch.float32
    return Verification(
        text=text_name,
        windows=len(windows),
        window=windows.shape[1],
        **scores.result(),
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


def held_out_windows(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """At least ``count`` windows, as many of every default domain, from text that no default calibration reads."""
    texts = evaluation_texts()
    share = -(-count // len(texts))
    longest = share * length * _CHARACTERS_PER_TOKEN
    parts = [text_windows(text[:longest], name, tokenizer, length, share) for name, text in texts.items()]
    return torch.cat(parts)


def load_model(location: Location) -> PreTrainedModel:
    """The model in float32, as any user of Transformers loads it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(**location.arguments, dtype=torch.float32, trust_remote_code=False)
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
        step = model(ids[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
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


class _Scores:
    """Sums over windows; a window's logits are compared in slices and then forgotten."""

    def __init__(self) -> None:
        self.nll_source = self.nll = self.kl = 0.0
        self.agreeing = self.predicted = 0
        self.worst = 0.0

    def add(self, expected: Tensor, found: Tensor, window: Tensor) -> None:
        """Logits ``[S, V]`` of both models on the token ids ``window [S]``."""
        targets = window[1:]
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, min(start + _ROWS, len(targets)))
            p, q = expected[rows].log_softmax(-1), found[rows].log_softmax(-1)
            index = targets[rows, None]
            self.nll_source -= float(p.gather(1, index).double().sum())
            self.nll -= float(q.gather(1, index).double().sum())
            self.kl += float((p.exp() * (p - q)).sum(-1).double().sum())
            self.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.worst = max(self.worst, float((expected[rows] - found[rows]).abs().max()))
        self.predicted += len(targets)

    def result(self) -> dict[str, float]:
        return {
            "perplexity_source": math.exp(self.nll_source / self.predicted),
            "perplexity": math.exp(self.nll / self.predicted),
            "kl": self.kl / self.predicted,
            "top1_agreement": self.agreeing / self.predicted,
            "max_abs_logit_error": self.worst,
        }
