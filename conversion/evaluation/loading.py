"""Loads models as any user of Transformers does, where they fit into memory."""

from __future__ import annotations

from typing import Any

import torch
from rich.filesize import decimal
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from ..checkpoint.location import Location
from ..devices.choice import CPU, free_bytes
from ..errors import SourceError, first_line


def load_model(
    location: Location, device: torch.device | str, dtype: torch.dtype = torch.float32, **placement: Any
) -> PreTrainedModel:
    """The model, as any user of Transformers loads it.

    Args:
        location: of its checkpoint.
        device: where it goes; ``disk`` is one.
        dtype: of its weights.
        placement: what else ``from_pretrained`` is told of where it goes.

    Raises:
        SourceError: it cannot be loaded.
    """
    arguments = location.arguments | {"config": location.config(), "device_map": {"": device}} | placement
    if location.gguf_file is not None:
        # Otherwise weights stay packed where Transformers finds kernels for them.
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    # Where it makes what no checkpoint holds.
    try:
        with CPU:
            model = AutoModelForCausalLM.from_pretrained(**arguments, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        # Transformers and its parsers raise many kinds; every one means that no user could load it.
        raise SourceError(f"{location.model} cannot be loaded by Transformers: {first_line(error)}") from error
    return model.eval()


def reason_to_leave_out(model: PreTrainedModel, device: torch.device, allowed: int | None) -> str | None:
    """Why a model of this size is not loaded whole, or None where it fits.

    Args:
        model: wherever it lies.
        device: where it would go.
        allowed: bytes that it may take; None for as many as are available.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    needed, available = parameters * torch.float32.itemsize, free_bytes(device)
    if needed > available:
        return f"it takes {decimal(needed)} of memory, and {decimal(available)} are available"
    if allowed is not None and needed > allowed:
        return f"it takes {decimal(needed)} of memory, and the conversion {decimal(allowed)}; mla verify does it"
    return None
