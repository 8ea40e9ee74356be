"""The registry of backends for absorbed attention.

A backend is one file, ``backend_<name>_mla.py``, and one line in :data:`BACKENDS`. The plain torch one is the reference
for all others.
"""

from __future__ import annotations

import torch
from transformers.utils import logging

from .backend_base_mla import AbsorbedBackend, AbsorbedShape
from .backend_cpu_mla import CpuBackend
from .backend_int8_mla import Int8Backend
from .backend_torch_mla import TorchBackend
from .backend_triton_mla import TritonBackend

logger = logging.get_logger(__name__)

_IN_ORDER: tuple[AbsorbedBackend, ...] = (CpuBackend(), Int8Backend(), TritonBackend(), TorchBackend())
BACKENDS = {backend.name: backend for backend in _IN_ORDER}
"""In order of preference for ``auto``."""


def select_backend(requested: str, shape: AbsorbedShape) -> AbsorbedBackend:
    """The backend for a shape: the first that supports it, or the requested one.

    Raises:
        ValueError: the requested one is unknown or cannot serve the shape, with its reason.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise ValueError(f"Unknown MLA backend {requested!r}; known are auto, {', '.join(BACKENDS)}.")
        reason = BACKENDS[requested].supports(shape)
        if reason is not None:
            raise ValueError(f"MLA backend {requested!r} cannot serve this attention: {reason}. Use backend 'auto'.")
        return BACKENDS[requested]
    for backend in BACKENDS.values():
        if backend.supports(shape) is None:
            if not torch.compiler.is_compiling():
                logger.info_once(f"Absorbed attention runs on the {backend.name} backend.")
            return backend
    raise ValueError(f"No MLA backend serves {shape}.")
