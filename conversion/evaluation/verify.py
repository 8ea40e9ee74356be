"""Is a converted checkpoint complete, consistent with itself, and how close to its source?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from modeling_mla.configuration_mla import is_coded

from ..checkpoint.location import locate
from ..checkpoint.model_reader import as_held
from ..checkpoint.reader import SafetensorsReader
from ..devices.choice import CPU
from ..devices.processes import Processes
from ..errors import CalibrationError, SourceError, VerificationError, blaming
from ..forward.products import fast_float32
from ..forward.streamed_model import StreamedModel
from ..progress import counting
from ..sources import SourceModel, is_mla
from ..text.default_mix import evaluation_texts
from .accounting import check_tensors
from .compare import compare_models
from .continuations import TEXTS
from .held_bytes import held_bytes
from .loading import reason_to_leave_out
from .scores import Score, Scores
from .source_outputs import SourceOutputs
from .whole_model import STEPS, WholeModel, check_whole_model

_CHARACTERS_PER_TOKEN = 16
"""Upper estimate: no more of a long text is tokenised than is needed."""
FAR_OFF = 2.5
"""A text whose KL is so many times that of the closest one is reported: the calibration lacked its kind."""
_SMALL_KL = 0.01
"""Nats a token, below which no text is far off."""
_BODY = ("num_hidden_layers", "hidden_size", "vocab_size")
"""What a model and the one that it was made from have in common, before any tensor is read."""


@dataclass(frozen=True)
class Verification(Score):
    """What was measured, in float32: the score over all texts, and more.

    ``domains`` are the scores of each text; ``layer_errors`` the relative squared error of each layer's attention
    output where both models read the source's hidden states. ``whole_model`` is None where the models were not loaded
    whole, and ``left_out`` then says why. ``cache_bytes_per_token`` is what a token adds to the cache, and
    ``cache_bytes_held`` all that it holds for one window, first tokens and slack included. A coded cache is compared
    with the source's in the type that the source keeps its own in.
    """

    domains: tuple[Score, ...]
    layer_errors: tuple[float, ...]
    whole_model: WholeModel | None
    left_out: str | None
    tensors: int
    tensors_unchanged: int
    cache_bytes_per_token_source: int
    cache_bytes_per_token: int
    cache_bytes_held: int

    @override
    def as_json(self) -> dict[str, Any]:
        """Plain values; those of the whole models beside the others."""
        found = super().as_json()
        whole = found.pop("whole_model") or {}
        return found | whole | {"far_off": [domain.text for domain in self.far_off]}

    @property
    def far_off(self) -> tuple[Score, ...]:
        """The texts on which the converted model is much farther from its source than on the best one."""
        limit = max(FAR_OFF * min(domain.kl for domain in self.domains), _SMALL_KL)
        return tuple(domain for domain in self.domains if domain.kl > limit)


@fast_float32()
def verify_checkpoint(
    folder: Path,
    source: SourceModel,
    texts: Mapping[str, Tensor],
    progress: Progress,
    allowed_bytes: int | None = None,
    outputs: SourceOutputs | None = None,
) -> Verification:
    """Verifies the checkpoint in ``folder`` against the model that it was made from.

    Both run side by side, one layer of either in memory, and several processes share the windows. Where a whole model
    fits, what only it can show follows.

    Args:
        folder: of the converted checkpoint.
        source: the model that it was made from, on the device that computes.
        texts: token ids ``[N, S]`` of the windows of each text to measure on, all of one length, by its name for the
            report.
        progress: shows how far it is.
        allowed_bytes: of memory for a whole model; None for what is available.
        outputs: of the source in earlier verifications; it is told of those that it lacks.

    Raises:
        VerificationError: a tensor is missing, unknown, misshapen or not finite; the checkpoint cannot be run, or
            gives logits that are not finite; the two routes differ; decoding from the cache differs from a full
            forward pass.
        SourceError: one of the two models cannot be loaded, or ``folder`` holds none with a latent cache.
    """
    location = locate(str(folder))
    config = location.config()
    if not is_mla(config):
        raise SourceError(f"{folder} is a {config.model_type} model without a latent cache; give a converted one.")
    for field in _BODY:
        found, wanted = getattr(config, field), getattr(source.config, field)
        if found != wanted:
            raise VerificationError(
                f"{field} of {folder} is {found}, of {source.location.model} {wanted}; give the model that it was made "
                "from, or convert it again."
            )
    model = _without_weights(folder, config)
    processes = Processes()
    tensors, unchanged = processes.from_first(check_tensors, folder, model, source)
    left_out = processes.from_first(reason_to_leave_out, model, source.device, allowed_bytes)
    windows, own = sum(map(len, texts.values())), _own_windows(texts, processes)
    names = list(texts)[:TEXTS]
    firsts = torch.stack([texts[name][0] for name in names])
    steps = sum(map(len, own.values())) * source.num_layers + (STEPS if left_out is None else 0)
    with counting(progress, "verifying", steps) as step:
        reference = StreamedModel(source, source.meta_model, source.held_tensors)
        converted = StreamedModel(source, model, as_held(SafetensorsReader(folder), model))
        found_here = processes.together(compare_models, reference, converted, source.num_layers, own, step, outputs)
        (of_first, layer_errors), *others = processes.gathered(found_here)
        scores = {name: sum((others_scores[name] for others_scores, _ in others), of_first[name]) for name in texts}
        processes.from_first(_refuse_not_finite, scores, layer_errors, source.location.name, folder)
        whole = None
        if left_out is None:
            whole = processes.from_first(check_whole_model, location, source, names, firsts, step, outputs)
    dtype = config.dtype or torch.float32
    overall = sum(scores.values(), Scores()).result(", ".join(texts), windows, firsts.shape[1])
    domains = tuple(score.result(name, *texts[name].shape) for name, score in scores.items())
    processes.from_first(_refuse_beyond_numbers, domains, source.location.name, folder)
    return Verification(
        **vars(overall),
        domains=domains,
        layer_errors=layer_errors,
        whole_model=whole,
        left_out=left_out,
        tensors=tensors,
        tensors_unchanged=unchanged,
        cache_bytes_per_token_source=source.cache_bytes_per_token(None if is_coded(config) else dtype),
        cache_bytes_per_token=config.cache_bytes_per_token(dtype),
        cache_bytes_held=held_bytes(config, firsts.shape[1], dtype),
    )


def _own_windows(texts: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The windows of this process, of every text; the first window of all is the first process's."""
    lengths = list(map(len, texts.values()))
    shares = torch.zeros(sum(lengths), dtype=torch.bool, device=CPU)
    shares[list(processes.share(len(shares)))] = True
    return {name: texts[name][share] for name, share in zip(texts, shares.split(lengths), strict=True)}


def _without_weights(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    with blaming(SourceError, f"the configuration of {folder} describes no model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _refuse_not_finite(scores: Mapping[str, Scores], layer_errors: Sequence[float], source: str, folder: Path) -> None:
    for text, score in scores.items():
        if not math.isfinite(score.nll_source):
            raise SourceError(f"{source} gives logits that are not finite on {text}; nothing can be compared with it.")
        if not math.isfinite(score.nll + score.kl + score.worst):
            raise VerificationError(
                f"{folder} gives logits that are not finite on {text}; convert with a larger cache."
            )
    for layer, error in enumerate(layer_errors):
        if not math.isfinite(error):
            raise VerificationError(
                f"the attention of layer {layer} of {folder} gives what is not finite; convert with a larger cache."
            )


def _refuse_beyond_numbers(domains: Sequence[Score], source: str, folder: Path) -> None:
    for domain in domains:
        said = f"gives the text {domain.text} no probability that a number holds"
        if math.isinf(domain.perplexity_source):
            raise SourceError(f"{source} {said}; look for weights that are damaged.")
        if math.isinf(domain.perplexity):
            raise VerificationError(f"{folder} {said}; convert with a larger cache.")


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
    return torch.tensor(ids[: complete * length], device="cpu").view(complete, length)


def held_out_windows(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> dict[str, Tensor]:
    """At least ``count`` windows, as many of every default domain, from text that no default calibration reads.

    They are token ids ``[n, length]`` by the name of the text. A domain whose text is shorter than one window is left
    out.

    Raises:
        CalibrationError: every domain's is.
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
