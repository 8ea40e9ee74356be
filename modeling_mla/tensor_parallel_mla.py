"""Tensor parallelism: every process has some heads, and all of them read the same latents and rotary keys.

Each gets the gradient of its own heads. Latents reach the heads through ``kv_b_proj``, whose parallel form sums over
the processes; rotary keys do not, so that is done here. Transformers' own style for it takes one width for all layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override


def tensor_parallel_group(projection: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which Transformers splits ``projection``, None where it does not."""
    for parameter in projection.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        # Other dimensions of a mesh are copies of the model (FSDP), which have their own way of summing.
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            return mesh.get_group("tp")
    return None


def read_by_all_heads(x: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """``x``, of any shape, with its gradient summed over the processes that share the heads of ``projection``."""
    if not torch.is_grad_enabled():
        return x
    # Asked before ``x``, of which an engine that reads the graph knows nothing.
    group = tensor_parallel_group(projection)
    return _SummedGradient.apply(x, group) if group is not None and x.requires_grad else x


def own_heads(x: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """Of ``x [B, S, H, d]``, which every process has whole, the heads that this one's ``projection`` serves."""
    group = tensor_parallel_group(projection)
    if group is None:
        return x
    return read_by_all_heads(x, projection).chunk(group.size(), dim=2)[group.rank()]


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
