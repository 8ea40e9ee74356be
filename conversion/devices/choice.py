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
    count = 0 if accelerator is None else torch.accelerator.device_count()
    # The first state decides how processes talk; without being told it takes none for several on the CPU.
    state = PartialState(cpu=accelerator is None or name == CPU.type, timeout=_PATIENCE)
    device = _named(str(state.device) if name == AUTO else name, state.local_process_index)
    if device is not None and device.type == CPU.type:
        return CPU
    there = [torch.device(accelerator.type, index) for index in range(count)] if accelerator is not None else []
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    if there and processes > (1 if ":" in name else count):
        raise ConversionError(f"{processes} processes would share {name}, and {count} are there; start one for each.")
    if device not in there:
        known = ", ".join(map(str, (CPU, *there)))
        raise ConversionError(f"there is no device {name!r}, only {known}; name one of these, or {AUTO}.")
    return device


def _named(name: str, own: int) -> torch.device | None:
    """The device of that name, with this process's number where it has none; None where PyTorch knows no such kind."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return None
    return device if device.index is not None else torch.device(device.type, own)


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
