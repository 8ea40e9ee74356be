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

_FORMAT = "modeling_mla.latent_cache.v1"
_SAMPLE = 64
"""Values of every parameter that identify a model: all of a large one's would take longer to read than the prefix."""


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the names, shapes and a sample of the values of all parameters, adapters included."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(flat.numel() // _SAMPLE, 1)]
            digest.update(sample.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _tokens_fingerprint(input_ids: torch.Tensor) -> str:
    return hashlib.sha256(repr(input_ids.tolist()).encode()).hexdigest()


def _tensors_fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
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
    tensors = {f"layers.{index}.latents": latents.cpu().clone() for index, (latents, _) in enumerate(layers)}
    description = {
        "format": _FORMAT,
        "model": model_fingerprint(model),
        "tokens": _tokens_fingerprint(input_ids),
        "content": _tensors_fingerprint(tensors),
        "kv_lora_ranks": [rank for _, rank in layers],
    }
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors | {"input_ids": input_ids.cpu().clone()}, partial, metadata={"prefix": json.dumps(description)})
    partial.replace(target)


def read_prefix(path: str | os.PathLike, model: PreTrainedModel) -> tuple[list[tuple[torch.Tensor, int]], torch.Tensor]:
    """What `write_prefix` wrote, checked; see `LatentCache.load`."""
    description, tensors = _read(path)
    input_ids = tensors.pop("input_ids")
    if _tensors_fingerprint(tensors) != description["content"]:
        raise ValueError(f"{path} is damaged: its content does not match its fingerprint; save the prefix again.")
    if _tokens_fingerprint(input_ids) != description["tokens"]:
        raise ValueError(f"{path} is damaged: its tokens do not match their fingerprint; save the prefix again.")
    dtype = tensors["layers.0.latents"].dtype
    if dtype != model.dtype:
        raise ValueError(f"{path} holds {dtype} latents, the model is {model.dtype}; load the model in {dtype}.")
    if model_fingerprint(model) != description["model"]:
        raise ValueError(f"{path} was written by another model (or other adapters); prefill its tokens with this one.")
    ranks = description["kv_lora_ranks"]
    layers = [(tensors[f"layers.{index}.latents"].to(model.device), rank) for index, rank in enumerate(ranks)]
    return layers, input_ids.to(model.device)


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("prefix", "{}"))
            if description.get("format") != _FORMAT:
                raise ValueError(f"{path} is no prefix of format {_FORMAT}; write one with LatentCache.save().")
            return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); save the prefix again.") from error
