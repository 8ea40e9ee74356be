"""The registry of backends for absorbed attention.

A backend is one file, ``backend_<name>_mla.py``, one line in :data:`BACKENDS` and its place in :data:`PREFERENCE`. The
plain torch one is the reference for all others.
"""

from __future__ import annotations

import functools
import os

import torch
from transformers.utils import logging

from .backend_base_mla import AbsorbedBackend, AbsorbedShape
from .backend_cpu_mla import CpuBackend
from .backend_fa3_mla import FlashAttention3Backend
from .backend_fa4_mla import FlashAttention4Backend
from .backend_flashinfer_mla import FlashInferBackend
from .backend_flashmla_mla import FlashMLABackend
from .backend_int8_mla import Int8Backend
from .backend_torch_mla import TorchBackend
from .backend_triton_mla import TritonBackend

logger = logging.get_logger(__name__)

_ALL: tuple[AbsorbedBackend, ...] = (
    CpuBackend(),
    Int8Backend(),
    FlashAttention3Backend(),
    FlashAttention4Backend(),
    FlashMLABackend(),
    FlashInferBackend(),
    TritonBackend(),
    TorchBackend(),
)
BACKENDS = {backend.name: backend for backend in _ALL}

PREFERENCE = {
    "cpu": ("cpu", "int8", "torch"),
    "sm80": ("flashinfer", "triton", "torch"),
    "sm90": ("fa3", "flashmla", "flashinfer", "triton", "torch"),
    "sm100": ("fa4", "triton", "flashinfer", "torch"),
    "other": ("torch",),
}
"""What ``auto`` tries, in order, by `architecture`."""

OVERRIDE = "MODELING_MLA_BACKEND"
"""The environment variable that stands for ``auto``; read when a model is made and when a backend is set."""


def architecture(device: torch.device) -> str:
    """The line of `PREFERENCE` for a device: of NVIDIA GPUs the newest that is not newer than the GPU."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return "cpu" if device.type == "cpu" else "other"
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(name[2:]) for name in PREFERENCE if name.startswith("sm")]
    older = [number for number in known if number <= 10 * major + minor]
    return f"sm{max(older)}" if older else "other"


@functools.cache
def _why_unavailable(name: str, device: torch.device) -> str | None:
    return BACKENDS[name].why_unavailable(device)


@functools.cache
def _preferred(device: torch.device) -> tuple[str, ...]:
    ordered = PREFERENCE.get(architecture(device), PREFERENCE["other"])
    return tuple(name for name in ordered if _why_unavailable(name, device) is None)


# Answers are constants of a compiled graph; PyTorch would trace what is behind a cache.
@torch.compiler.assume_constant_result
def why_unavailable(name: str, device: torch.device) -> str | None:
    """The reason why a backend does not run on a device, None where it does: asked once, by name and device."""
    return _why_unavailable(name, device)


@torch.compiler.assume_constant_result
def preferred(device: torch.device) -> tuple[str, ...]:
    """The names of what runs on a device, in the order in which ``auto`` tries them."""
    return _preferred(device)


def forget_availability() -> None:
    """Asks every backend anew: for what was installed, or taken away, since."""
    _why_unavailable.cache_clear()
    _preferred.cache_clear()


def devices() -> list[torch.device]:
    """All on which absorbed attention may be asked for here: the CPU and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def refusals(name: str) -> dict[torch.device, str]:
    """Why a backend does not run here, by device; on a machine without a GPU also what it lacks beside one."""
    asked = devices()
    if not torch.cuda.is_available() and why_unavailable(name, asked[0]) is not None:
        asked = [torch.device("cuda", 0)]
    answers = {device: why_unavailable(name, device) for device in asked}
    return {device: reason for device, reason in answers.items() if reason is not None}


def checked_backend(requested: str) -> str:
    """``requested`` itself; for ``auto`` what the environment says, ``auto`` where it says nothing.

    Raises:
        ValueError: there is no backend of that name, or it runs on no device of this machine, with its reason.
    """
    given = os.environ.get(OVERRIDE, "auto") if requested == "auto" else requested
    if given == "auto":
        return given
    source = f"{OVERRIDE} is {given!r}" if requested == "auto" else f"The MLA backend is {given!r}"
    usable = ", ".join(name for name in BACKENDS if any(why_unavailable(name, device) is None for device in devices()))
    if given not in BACKENDS:
        raise ValueError(f"{source}, and no backend has that name; here can be used: auto, {usable}.")
    if given not in usable.split(", "):
        reasons = "; ".join(dict.fromkeys(refusals(given).values()))
        raise ValueError(f"{source}, which cannot be used here: {reasons}. Here can be used: auto, {usable}.")
    return given


def why_not(name: str, shape: AbsorbedShape) -> str | None:
    """The reason why a backend cannot serve a shape on its device, None where it can."""
    return BACKENDS[name].supports(shape) or why_unavailable(name, shape.device)


def select_backend(requested: str, shape: AbsorbedShape) -> AbsorbedBackend:
    """The backend for a shape: the first that supports it, or the requested one.

    Raises:
        ValueError: the requested one is unknown or cannot serve the shape, with its reason.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise ValueError(f"There is no MLA backend {requested!r}; there are auto, {', '.join(BACKENDS)}.")
        reason = why_not(requested, shape)
        if reason is not None:
            others = [name for name in preferred(shape.device) if BACKENDS[name].supports(shape) is None]
            message = f"MLA backend {requested!r} cannot serve this attention: {reason}."
            raise ValueError(f"{message} These can: auto, {', '.join(others)}.")
        return BACKENDS[requested]
    for name in preferred(shape.device):
        backend = BACKENDS[name]
        if backend.supports(shape) is None:
            if not torch.compiler.is_compiling():
                logger.info_once(f"Absorbed attention runs on the {name} backend.")
            return backend
    raise ValueError(f"No MLA backend serves {shape}.")
