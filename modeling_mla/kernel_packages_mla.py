"""What the backends share that call a package of GPU kernels: finding it, trying it, and rows as pages.

No package is imported before a backend that needs it is asked about a GPU, and none by a statement: Transformers
refuses the code of a checkpoint that states imports which are not installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from typing import Any, NamedTuple

import torch

from .backend_base_mla import AbsorbedBackend, AbsorbedShape
from .masks_mla import VisibleKeys

HALF_DTYPES = (torch.bfloat16, torch.float16)
PAGE = 64
"""Rows of a page: a capacity of `LatentCache` is a multiple of it."""
DEEPSEEK_RANK, DEEPSEEK_ROPE = 512, 64
"""For which packages have kernels of their own."""
_TRIAL_KEYS = 70
_TRIAL_ERROR = 2e-2


def installed(*names: str) -> str | None:
    """The first of some modules that can be imported here; none is, nor a package around it."""
    return next((name for name in names if _is_there(name)), None)


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return True
    first, *parts = name.split(".")
    spec = importlib.util.find_spec(first)
    for part in parts:
        if spec is None:
            break
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec is not None


def load(*names: str) -> Any:
    """The first of some modules that is installed; looked up, once it is imported."""
    for name in names:
        if name in sys.modules:
            return sys.modules[name]
    return importlib.import_module(installed(*names) or names[0])


def why_no_gpu(device: torch.device, least: tuple[int, int], most: tuple[int, int] | None = None) -> str | None:
    """The reason why ``device`` is no NVIDIA GPU of a compute capability between two; None where it is one."""
    if device.type != "cuda":
        return f"it takes tensors on an NVIDIA GPU, not on {device.type}"
    if torch.version.hip is not None:
        return "it was written for NVIDIA GPUs, and PyTorch was built for AMD's"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < least or (most is not None and capability > most):
        wanted = f"{least}" if most == least else f"from {least}" + (f" to {most}" if most else "")
        return f"it needs a GPU of compute capability {wanted}, and this one has {capability}"
    return None


def why_trial_fails(backend: AbsorbedBackend, device: torch.device, rank: int, rope: int) -> str | None:
    """Runs a backend once over a few random tokens; None where it gives what attention in float32 does."""
    generator = torch.Generator(device).manual_seed(0)
    query, latents = (
        torch.randn(*size, rank + rope, generator=generator, device=device).bfloat16()
        for size in ((2, 16, 1), (2, _TRIAL_KEYS))
    )
    scale = (rank + rope) ** -0.5
    try:
        with torch.no_grad():
            visible = VisibleKeys(None, 1, _TRIAL_KEYS, device)
            context, _ = backend.attend(query, latents, rank, scale, visible, None)
    except Exception as failure:  # Packages fail in as many ways as there are builds of them.
        return f"a trial failed: {failure}"
    keys = latents.float()
    weights = torch.softmax(query.squeeze(2).float() @ keys.mT * scale, dim=-1)
    wanted = (weights @ keys[..., :rank]).unsqueeze(2)
    error = float((context - wanted).norm() / wanted.norm())
    return None if error < _TRIAL_ERROR else f"a trial was wrong by {error:.2g} of its result"


def why_not_plain(shape: AbsorbedShape) -> str | None:
    """What no package of kernels here serves: codes, other dtypes, gradients."""
    if shape.code is not None:
        return "it takes no coded latents"
    if shape.dtype not in HALF_DTYPES:
        return f"it takes {' and '.join(str(dtype) for dtype in HALF_DTYPES)}, not {shape.dtype}"
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "it has no gradient and is not compiled"
    return None


def why_not_deepseek(shape: AbsorbedShape) -> str | None:
    """As `why_not_plain`, for kernels of `DEEPSEEK_RANK` and `DEEPSEEK_ROPE` alone, which take no softcap."""
    if reason := why_not_plain(shape):
        return reason
    if (shape.kv_lora_rank, shape.qk_rope_head_dim) != (DEEPSEEK_RANK, DEEPSEEK_ROPE):
        widths = f"{shape.kv_lora_rank} and {shape.qk_rope_head_dim}"
        return f"it takes rank {DEEPSEEK_RANK} and rotary keys of {DEEPSEEK_ROPE}, not {widths}"
    return None if shape.softcap is None else "it takes no softcap"


def why_not_runs(shape: AbsorbedShape) -> str | None:
    """The reason why what hides keys is no run of them. Looks at masks, so it is to be asked last."""
    if shape.has_mask and (shape.visible is None or shape.visible.bounds(shape.batch) is None):
        return "it takes runs of keys (a start and an end of every sequence), and the mask is none"
    return None


def why_not_from_zero(shape: AbsorbedShape) -> str | None:
    """As `why_not_runs`, for kernels that read every sequence from the cache's first key on."""
    reason = why_not_runs(shape)
    bounds = None if reason is not None or shape.visible is None else shape.visible.bounds(shape.batch)
    if bounds is not None and not (bounds.from_zero and bounds.window is None):
        return "it takes sequences that begin with the cache: neither padding on the left nor a window"
    return reason


class Pages(NamedTuple):
    """Latents as pages.

    Args:
        rows: ``[N, PAGE, w]``, all pages of a buffer.
        table: ``[B, P]`` int32, the pages of every sequence in their order.
    """

    rows: torch.Tensor
    table: torch.Tensor


def pages(latents: torch.Tensor) -> Pages:
    """``latents [B, S, w]`` as pages: where they lie, if a sequence begins every so many pages; else in a copy."""
    batch, length, width = latents.shape
    count = -(-length // PAGE)
    apart = latents.stride(0) if batch > 1 else count * PAGE * width
    needed = latents.storage_offset() + (batch - 1) * apart + count * PAGE * width
    held = latents.untyped_storage().nbytes() // latents.itemsize
    if latents.stride()[1:] != (width, 1) or apart % (PAGE * width) or needed > held:
        latents = torch.nn.functional.pad(latents, (0, 0, 0, count * PAGE - length))
        apart = count * PAGE * width
    step = apart // (PAGE * width)
    rows = latents.as_strided(((batch - 1) * step + count, PAGE, width), (PAGE * width, width, 1))
    first = torch.arange(batch, device=latents.device, dtype=torch.int32) * step
    return Pages(rows, first[:, None] + torch.arange(count, device=latents.device, dtype=torch.int32))
