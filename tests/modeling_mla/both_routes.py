"""Both routes in every call: whichever runs, the other one runs as well, and they have to agree.

Suites that compare a model with itself pass whatever the absorbed route computes, for most calls take the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modeling_mla import routes_mla
from modeling_mla.absorbed_weights_mla import why_no_matrix

# As they are before a test replaces them to count calls.
attend_latents, attend_absorbed = routes_mla.attend_latents, routes_mla.attend_absorbed
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative to the largest value of an output."""


class Comparison:
    """Stands in for `attend_latents`; ``calls`` counts the comparisons made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        function: Callable,
        implementation: str,
        module: Any,
        query: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        mask: Any,
        dropout: float = 0.0,
        scaling: float = 1.0,
        **kwargs,
    ):
        arguments = (function, implementation, module, query, kv_c, k_pe, mask)
        paged_by_function = kwargs.get("cache") is not None
        output, weights = attend_latents(*arguments, dropout=dropout, scaling=scaling, **kwargs)
        kwargs.pop("latents", None)
        reason = routes_mla.why_expand(module, query, implementation, dropout, kwargs)
        if reason is None and not paged_by_function and why_no_matrix(module.kv_b_proj) is None:
            with torch.no_grad():
                self._compare(*arguments, scaling, kwargs)
        return output, weights

    def _compare(self, function, implementation, module, query, kv_c, k_pe, mask, scaling, kwargs) -> None:
        visible = routes_mla._visible_keys(query, kv_c, mask, implementation, kwargs)
        latents = routes_mla.fused_latents(kv_c, k_pe)
        absorbed = attend_absorbed(module, query, latents, visible, scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
        if implementation == "paged|eager":
            function = routes_mla.eager_attention_forward
        key, value = module.expand_latents(kv_c, k_pe)
        expanded, _ = function(module, query, key, value, mask, dropout=0.0, scaling=scaling, **kwargs)
        seen = _rows_that_see(visible.dense(), expanded.shape)
        difference = ((absorbed - expanded) * seen).abs().max()
        limit = TOLERANCES[query.dtype] * (expanded * seen).abs().max().clamp(min=1e-3)
        assert difference <= limit, f"routes differ by {difference:.3g} where {limit:.3g} is rounding"
        self.calls += 1


def _rows_that_see(mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """``[B, n, 1 or H, 1]``, or 1 for all; 0 for queries without a key (left padding), whose output means nothing."""
    if mask is None:
        return torch.ones((), dtype=torch.bool)
    attends = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return attends.any(-1).transpose(1, 2).unsqueeze(-1)
