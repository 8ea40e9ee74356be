"""A prefix on disk: the latent cache of some tokens, saved once and continued from any number of times."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

_FORMAT = "modeling_mla.latent_cache.v2"
_SAMPLE = 64
"""Values of every tensor that identify a model: all of a large one's would take longer to read than the prefix."""
_FIELDS = {"format": str, "model": str, "content": str, "kv_lora_ranks": list}


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the names, shapes and a sample of the values of all parameters and buffers: adapters and rotary
    frequencies included.
    """
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
    path: str | os.PathLike,
    layers: list[tuple[torch.Tensor, int]],
    model: PreTrainedModel,
    input_ids: torch.Tensor,
) -> None:
    """Writes latents to a safetensors file that appears only when it is complete; see `LatentCache.save`.

    Args:
        layers: of every layer the latents ``[B, S, r + d_r]`` and r.
    """
    tensors = {_latents_name(index): latents.cpu().clone() for index, (latents, _) in enumerate(layers)}
    tensors["input_ids"] = input_ids.cpu().clone()
    description: dict[str, Any] = {
        "format": _FORMAT,
        "model": model_fingerprint(model),
        "kv_lora_ranks": [rank for _, rank in layers],
    }
    description["content"] = _content_fingerprint(description, tensors)
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors, partial, metadata={"prefix": json.dumps(description)})
    partial.replace(target)


def read_prefix(
    path: str | os.PathLike, model: PreTrainedModel, num_layers: int
) -> tuple[list[tuple[torch.Tensor, int]], torch.Tensor]:
    """What `write_prefix` wrote of ``num_layers`` layers, checked; see `LatentCache.load`."""
    description, tensors = _read(path)
    reason = _why_damaged(description, tensors)
    if reason is not None:
        raise ValueError(f"{path} is damaged: {reason}; save the prefix again.")
    ranks, input_ids = description["kv_lora_ranks"], tensors["input_ids"]
    if len(ranks) != num_layers:
        raise ValueError(f"{path} holds {len(ranks)} layers, the model caches {num_layers}; prefill with this model.")
    dtype = tensors[_latents_name(0)].dtype
    if dtype != model.dtype:
        raise ValueError(f"{path} holds {dtype} latents, the model is {model.dtype}; load the model in {dtype}.")
    if model_fingerprint(model) != description["model"]:
        raise ValueError(f"{path} was written by another model (or other adapters); prefill its tokens with this one.")
    layers = [(tensors[_latents_name(index)].to(model.device), rank) for index, rank in enumerate(ranks)]
    return layers, input_ids.to(model.device)


def _latents_name(layer: int) -> str:
    return f"layers.{layer}.latents"


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


def _why_damaged(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str | None:
    """What in a file is not as `write_prefix` leaves it, None where all is."""
    if {name: type(value) for name, value in description.items()} != _FIELDS:
        return f"its description is not one of {', '.join(_FIELDS)}"
    if description["content"] != _content_fingerprint(description, tensors):
        return "its content does not match its fingerprint"
    ranks, input_ids = description["kv_lora_ranks"], tensors.get("input_ids")
    expected = {"input_ids", *(_latents_name(layer) for layer in range(len(ranks)))}
    if not ranks or input_ids is None or set(tensors) != expected:
        return f"it holds {', '.join(sorted(tensors))} for {len(ranks)} layers"
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        return f"its input_ids are {input_ids.dtype} of {tuple(input_ids.shape)}"
    for layer, rank in enumerate(ranks):
        shape = tensors[_latents_name(layer)].shape
        if type(rank) is not int or len(shape) != 3 or shape[:2] != input_ids.shape or not 0 < rank <= shape[2]:
            return f"layer {layer} has latents of {tuple(shape)}, rank {rank!r}, for tokens of {tuple(input_ids.shape)}"
    return None
