"""Absorbed attention by Triton kernels on NVIDIA GPUs: decode and short chunks, one pass over the cache."""

from __future__ import annotations

import functools
import importlib.util

import torch

from .backend_base_mla import AbsorbedShape
from .code_words_mla import code_plan
from .latent_code_mla import LatentCode, code_numbers
from .latent_tiles_mla import CodedLatents
from .masks_mla import VisibleKeys

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_RANK = 512
_MAX_COLUMNS = 768
_MAX_ROPE = 128
_MAX_QUERIES = 64
_RANK_STEP = 16
_CAPABILITY = (8, 0)


class TritonBackend:
    """Splits the context over the multiprocessors and merges the parts by their log-sum-exp."""

    name = "triton"
    serves = (
        f"NVIDIA GPUs from sm80; bfloat16, float16, float32; ranks up to {_MAX_RANK} that {_RANK_STEP} divides, rotary "
        f"keys up to {_MAX_ROPE}, at most {_MAX_QUERIES} queries, any mask, codes of one scale a token, no gradient"
    )

    def why_unavailable(self, device: torch.device) -> str | None:
        """None where the kernels run on the device, which is tried; else the reason why not."""
        if device.type != "cuda":
            return f"it takes tensors on an NVIDIA GPU, not on {device.type}"
        return _why_unavailable(device.index or 0)

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for few queries over plain latents or codes on an NVIDIA GPU, else the reason why not."""
        if shape.device.type != "cuda":
            return f"it takes tensors on an NVIDIA GPU, not on {shape.device.type}"
        if shape.dtype not in _DTYPES:
            return f"it takes bfloat16, float16 and float32, not {shape.dtype}"
        if shape.code is not None:
            reason = _why_not_coded(shape.code)
            if reason is not None:
                return reason
        elif shape.kv_lora_rank % _RANK_STEP or not 0 < shape.kv_lora_rank <= _MAX_RANK:
            return f"it takes ranks up to {_MAX_RANK} that {_RANK_STEP} divides, not {shape.kv_lora_rank}"
        if shape.qk_rope_head_dim > _MAX_ROPE:
            return f"it takes rotary keys of at most {_MAX_ROPE} channels, not {shape.qk_rope_head_dim}"
        if shape.query_length > _MAX_QUERIES:
            return f"it takes at most {_MAX_QUERIES} queries, not {shape.query_length}"
        if torch.is_grad_enabled():
            return "it has no gradient"
        return _why_unavailable(shape.device.index or 0)

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor | CodedLatents,
        kv_lora_rank: int,
        scale: float,
        visible: VisibleKeys,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends as `AbsorbedBackend.attend` says; sums are float32."""
        if isinstance(latents, CodedLatents):
            from .triton_coded_decode_mla import absorbed_coded_decode, coded_decode

            latent, rope = latents
            attend_coded = absorbed_coded_decode if torch.compiler.is_compiling() else coded_decode
            return attend_coded(
                query, latent.rows, rope.rows, latent.exact, rope.exact, latent.places,
                code_numbers(latent.codec.code), code_numbers(rope.codec.code),
                visible.given(), visible.first_query, visible.window, scale, softcap,
            )  # fmt: skip
        from .triton_decode_mla import absorbed_decode, decode

        function = absorbed_decode if torch.compiler.is_compiling() else decode
        return function(
            query, latents, visible.given(), visible.first_query, visible.window, kv_lora_rank, scale, softcap
        )


def writes_codes(code: LatentCode, rotated: torch.Tensor) -> bool:
    """Whether the kernel of `triton_append_mla` serves tokens ``rotated [B, n, r + d_r]``."""
    if rotated.device.type != "cuda" or rotated.dtype not in _DTYPES or _why_not_coded(code) is not None:
        return False
    return _why_unavailable(rotated.device.index or 0) is None


def _why_not_coded(code: LatentCode) -> str | None:
    for name, part in (("latent", code.latent), ("rope", code.rope)):
        if len(part.groups) > 1:
            return f"it takes one scale a token, and the {name} code has {len(part.groups)}"
    columns = code_plan(code.latent, alignment=1).columns
    if columns > _MAX_COLUMNS:
        return f"it takes latents of at most {_MAX_COLUMNS} channels in segments padded to powers of two, not {columns}"
    return None


@torch.compiler.assume_constant_result
def _why_unavailable(device: int) -> str | None:
    return _ask(device)


@functools.cache
def _ask(device: int) -> str | None:
    """The reason why kernels do not run on a device, None where they do; asked once, by running them."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is not None:
        return "it was written for NVIDIA GPUs, and PyTorch was built for AMD's"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"it needs compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}, and the GPU has {capability}"
    try:
        from .triton_decode_mla import decode

        rows = torch.ones(1, 1, 1, _RANK_STEP, dtype=torch.bfloat16, device=f"cuda:{device}")
        decode(rows, rows[0], None, None, None, _RANK_STEP, 1.0, None)
    except Exception as error:  # Triton compiles its launchers, which fails in as many ways as there are compilers.
        return f"a trial failed: {error}"
    return None
