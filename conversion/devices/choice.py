"""The device that a user names: checked, or chosen as Accelerate would."""

from __future__ import annotations

import os
from datetime import timedelta

import psutil
import torch
from accelerate import PartialState

from ..errors import ConversionError

AUTO = "auto"
"""What `accelerate` would take."""
CPU = torch.device("cpu")
_PATIENCE = timedelta(days=1)
"""With which processes wait for each other: one of them may verify a large model meanwhile."""


def chosen_device(name: str) -> torch.device:
    """The device of that name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps`` or what else PyTorch calls one.

    Without a number it is this process's own, as Accelerate counts them.

    Raises:
        ConversionError: there is none.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # The first state decides how processes talk; without being told it takes none for several on the CPU.
    state = PartialState(cpu=accelerator is None or name == CPU.type, timeout=_PATIENCE)
    if name == AUTO:
        device = state.device
        return CPU if device.type == CPU.type else torch.device(device.type, device.index or 0)
    if name == CPU.type:
        return CPU
    count = 0 if accelerator is None else torch.accelerator.device_count()
    kind, _, number = name.partition(":")
    if accelerator is not None and kind == accelerator.type and (not number or number.isdecimal()):
        index = int(number) if number else state.local_process_index
        here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        if here > (1 if number else count):
            raise ConversionError(f"{here} processes share {1 if number else count} of {kind}; start one for each.")
        if index < count:
            return torch.device(kind, index)
    there = [CPU.type, *(f"{accelerator}:{index}" for index in range(count))]
    raise ConversionError(f"there is no device {name!r}, only {', '.join(there)}; name one of these, or {AUTO}.")


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: Apple's do not, and of others it is not known."""
    return device.type in ("cpu", "cuda")


def solving_device(device: torch.device) -> torch.device:
    """Where a layer that was measured on ``device`` is factorised, which takes float64 and complex numbers."""
    return device if has_float64(device) else CPU


def free_bytes(device: torch.device) -> int:
    """Memory that is free for a model on the device. Where a device does not say, it shares that of the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
