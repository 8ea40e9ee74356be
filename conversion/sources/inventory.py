"""Does a checkpoint hold the tensors that its configuration means, and no others? If not, what is it?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from modeling_mla.attention_mla import layer_window

from ..checkpoint.json_fields import FLOATS
from ..checkpoint.reader import TensorReader
from ..errors import SourceError

_HEADS = ("score.", "classifier.", "qa_outputs.", "v_head.")
_PACKED = (".scales", ".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax", ".SCB")
_FLOAT = "give the checkpoint in bfloat16, float16 or float32"
_CACHED_BY = ("attention_chunk_size", "kv_sharing_modes", "layer_types", "sliding_window")
"""Fields by which the caches of Transformers choose what a layer keeps, of whatever model."""


def refuse_unfit(name: str, config: PreTrainedConfig, head_dim: int, kv_heads: int) -> None:
    """Raises `SourceError` where the configuration of the checkpoint ``name`` rules a conversion out.

    Then weights are packed or no floats, heads are no attention's, attention is not causal, or caches are not its
    attention's.
    """
    for field in ("quantization_config", "quantization"):
        said = getattr(config, field, None)
        if said is not None:
            kind = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
            how = f"by {kind}" if kind else f"({field} in its configuration, as MLX writes it)"
            raise SourceError(f"{name} has weights quantised {how}, which cannot be converted; {_FLOAT}.")
    if config.dtype is not None and config.dtype not in FLOATS.values():
        dtype = str(config.dtype).removeprefix("torch.")
        raise SourceError(f"the configuration of {name} has dtype {dtype}; only {', '.join(FLOATS)} are converted.")
    for field in _CACHED_BY:
        if getattr(config, field, None) is not None and not hasattr(type(config), field):
            raise SourceError(
                f"{name} has {field}, which its model ({config.model_type}) ignores, though caches do not; remove it "
                "from the configuration, or name the model that it is in model_type."
            )
    if getattr(config, "use_bidirectional_attention", False):
        raise SourceError(
            f"{name} has use_bidirectional_attention: its tokens attend to later ones, of which there are none in a "
            "cache; give a model that generates."
        )
    # A configuration may name one that no layer has.
    windows = {layer_window(config, layer) for layer in range(config.num_hidden_layers)}
    if any(window is not None and window < 1 for window in windows):
        raise SourceError(
            f"{name} has sliding_window {config.sliding_window}, with which a query does not even see itself; give its "
            "true size, or remove it from the configuration."
        )
    heads = config.num_attention_heads
    if heads % kv_heads:
        raise SourceError(f"{name} has {heads} heads, no multiple of its {kv_heads} key/value heads.")
    if head_dim < 2:
        raise SourceError(f"{name} has heads of {head_dim} channels; at least 2 make a rotary pair.")


def refuse_rotation(
    name: str, model: str, ropes: Iterable[Mapping[str, Any]], known: Collection[str], *, partly: bool
) -> None:
    """Raises `SourceError` for rotary parameters that have no fixed table of frequencies, or that a model ignores.

    Args:
        name: of the checkpoint, for the message.
        model: the name of its class.
        ropes: every set of parameters.
        known: the types that are converted.
        partly: whether the model reads ``partial_rotary_factor``.
    """
    for rope in ropes:
        if rope["rope_type"] not in known:
            raise SourceError(
                f"{name} has rotary scaling {rope['rope_type']!r}, whose frequencies depend on the length of the text; "
                f"supported are {', '.join(known)}."
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and not partly:
            raise SourceError(
                f"{name} has partial_rotary_factor {rope['partial_rotary_factor']}, which {model} does not apply; "
                "remove it from the configuration."
            )


def account_for_all(
    name: str,
    reader: TensorReader,
    model: PreTrainedModel,
    found: Collection[str],
    replaced: Callable[[str], int | None],
) -> None:
    """Compares names, shapes and types of a checkpoint's tensors with those of its model.

    Args:
        name: of the checkpoint, for the message.
        reader: gives the tensors as the model holds them.
        model: on the meta device.
        found: the tensors of ``reader`` that the model shall read.
        replaced: gives the layer of a tensor that is converted; None for one whose bytes pass through.

    Raises:
        SourceError: a tensor is missing, unknown, misshapen, or no float where the model has one. What is converted
            must be of a type in which weights are converted; what passes through may be a narrower float.
    """
    state = model.state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    missing = [key for key in expected if key not in found and key not in tied]
    unknown = sorted(key for key in found if key not in expected)
    if missing or unknown:
        raise SourceError(f"{name} {_what_it_is(missing, unknown, expected, type(model).__name__)}.")
    for key in sorted(found):
        if replaced(key) is not None or reader.dtype(key).is_floating_point != state[key].is_floating_point():
            reader.require_weights(key)
        if reader.shape(key) != expected[key]:
            raise SourceError(f"{key} of {name} is {reader.shape(key)}, but the configuration means {expected[key]}.")


def _what_it_is(missing: list[str], unknown: list[str], expected: Collection[str], model: str) -> str:
    packed = next((key for key in unknown if key.endswith(_PACKED)), None)
    if packed is not None:
        return f"has quantised weights ({packed}), which are not converted; {_FLOAT}"
    head = next((key for key in unknown if key.startswith(_HEADS)), None)
    if head is not None:
        return f"is no language model but has another head ({head}); give the model that it was trained from"
    bare = next((key for key in unknown if f"model.{key}" in expected), None)
    if bare is not None:
        return (
            f"holds a model without its head: its tensors are named {bare}, not model.{bare}; load it as {model}, see "
            "that the head is right, and save that"
        )
    if missing:
        return f"lacks tensor {missing[0]}, one of {len(missing)}; fetch the model again"
    return f"holds tensor {unknown[0]}, which {model} does not read; the conversion would lose it"


def reading_order(name: str) -> list[tuple[int, str]]:
    """The key by which tensors are sorted by name, numbers by their value: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]
