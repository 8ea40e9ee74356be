"""A prefix on disk: the latent cache of some tokens, saved once and continued from any number of times."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .latent_code_mla import LatentCode

_FORMAT = "modeling_mla.latent_cache.v3"
_SAMPLE = 64
"""Values of every tensor that identify a model: all of a large one's would take longer to read than the prefix."""
_FIELDS = {"format": str, "model": str, "content": str, "dtype": str, "kv_lora_ranks": list, "codes": list}


@dataclass(frozen=True)
class SavedLayer:
    """What a layer holds of some tokens.

    Args:
        rows: ``[B, S, r + d_r]`` in the model's dtype, or of a code ``[B, S, code.nbytes]`` uint8.
        kv_lora_rank: r.
        code: of the rows, None where they are not coded.
        exact: ``[B, e, r + d_r]``, the first tokens that a code keeps besides; None where there is no code.
    """

    rows: torch.Tensor
    kv_lora_rank: int
    code: LatentCode | None = None
    exact: torch.Tensor | None = None


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the names, shapes and a sample of the values of all parameters and buffers: adapters and rotary
    frequencies included."""
    digest = hashlib.sha256()
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers()), key=lambda named: named[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(flat.numel() // _SAMPLE, 1)]
            digest.update(sample.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _content_fingerprint(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """A hash of all that a file says: of every tensor what it is as well, for bytes alone fit many shapes."""
    said = {name: value for name, value in description.items() if name != "content"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_prefix(
    path: str | os.PathLike, layers: list[SavedLayer], model: PreTrainedModel, input_ids: torch.Tensor
) -> None:
    """Writes layers to a safetensors file that appears only when it is complete; see `LatentCache.save`."""
    tensors = {"input_ids": input_ids.cpu().clone()}
    for index, layer in enumerate(layers):
        tensors[_latents_name(index)] = layer.rows.cpu().clone()
        if layer.exact is not None:
            tensors[_exact_name(index)] = layer.exact.cpu().clone()
    description: dict[str, Any] = {
        "format": _FORMAT,
        "model": model_fingerprint(model),
        "dtype": str(model.dtype),
        "kv_lora_ranks": [layer.kv_lora_rank for layer in layers],
        "codes": [None if layer.code is None else layer.code.to_dict() for layer in layers],
    }
    description["content"] = _content_fingerprint(description, tensors)
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors, partial, metadata={"prefix": json.dumps(description)})
    partial.replace(target)


def read_prefix(
    path: str | os.PathLike, model: PreTrainedModel, num_layers: int
) -> tuple[list[SavedLayer], torch.Tensor]:
    """What `write_prefix` wrote of ``num_layers`` layers, checked; see `LatentCache.load`."""
    description, tensors = _read(path)
    try:
        layers = _saved_layers(description, tensors)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; save the prefix again.") from error
    input_ids, dtype = tensors["input_ids"], description["dtype"]
    if len(layers) != num_layers:
        raise ValueError(f"{path} holds {len(layers)} layers, the model caches {num_layers}; prefill with this model.")
    if dtype != str(model.dtype):
        raise ValueError(f"{path} holds {dtype} latents, the model is {model.dtype}; load the model in {dtype}.")
    if model_fingerprint(model) != description["model"]:
        raise ValueError(f"{path} was written by another model (or other adapters); prefill its tokens with this one.")
    on_device = [
        replace(
            layer,
            rows=layer.rows.to(model.device),
            exact=None if layer.exact is None else layer.exact.to(model.device),
        )
        for layer in layers
    ]
    return on_device, input_ids.to(model.device)


def _latents_name(layer: int) -> str:
    return f"layers.{layer}.latents"


def _exact_name(layer: int) -> str:
    return f"layers.{layer}.exact"


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("prefix", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); save the prefix again.") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{path} is no prefix of format {_FORMAT}; write one with LatentCache.save().")
    return description, tensors


def _saved_layers(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[SavedLayer]:
    """What the tensors are by the description.

    Raises:
        ValueError: something is not as `write_prefix` leaves it.
    """
    if {name: type(value) for name, value in description.items()} != _FIELDS:
        raise ValueError(f"its description is not one of {', '.join(_FIELDS)}")
    if description["content"] != _content_fingerprint(description, tensors):
        raise ValueError("its content does not match its fingerprint")
    ranks, codes, input_ids = description["kv_lora_ranks"], description["codes"], tensors.get("input_ids")
    if not ranks or input_ids is None or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"it has {len(ranks)} layers, and its input_ids are {input_ids!r}")
    layers = []
    for index, (rank, written) in enumerate(zip(ranks, codes, strict=True)):
        code = None if written is None else LatentCode.from_dict(written)
        rows, exact = tensors.get(_latents_name(index)), tensors.get(_exact_name(index))
        layer = None if rows is None or type(rank) is not int else SavedLayer(rows, rank, code, exact)
        if layer is None or not _fits(layer, input_ids.shape, description["dtype"]):
            raise ValueError(f"layer {index} is not what its rank {rank!r} and its code {written} say")
        layers.append(layer)
    if len(tensors) != 1 + len(layers) + sum(layer.exact is not None for layer in layers):
        raise ValueError(f"it holds {', '.join(sorted(tensors))} for {len(layers)} layers")
    return layers


def _fits(layer: SavedLayer, tokens: torch.Size, dtype: str) -> bool:
    if layer.rows.dim() != 3 or layer.rows.shape[:2] != tokens or layer.kv_lora_rank < 1:
        return False
    width = layer.rows.shape[2]
    if layer.code is None:
        return layer.exact is None and str(layer.rows.dtype) == dtype and layer.kv_lora_rank <= width
    if layer.exact is None or str(layer.exact.dtype) != dtype:
        return False
    exact = (tokens[0], min(layer.code.exact_tokens, tokens[1]), layer.code.latent.channels + layer.code.rope.channels)
    coded = layer.rows.dtype == torch.uint8 and width == layer.code.nbytes
    return coded and layer.code.latent.channels == layer.kv_lora_rank and tuple(layer.exact.shape) == exact
