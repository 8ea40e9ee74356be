"""Random cases of absorbed attention for kernels, and what they must give, in float64 and without any code of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from modeling_mla.masks_mla import VisibleKeys

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the whole context, as the norm of its error over its own."""
FREE_ROWS = 5


@dataclass(frozen=True)
class Case:
    """``kind`` says how keys are hidden, one of `KINDS`."""

    kind: str = "none"
    batch: int = 2
    heads: int = 3
    queries: int = 1
    keys: int = 70
    rank: int = 32
    rope: int = 8
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    window: int = 9


def _placed(case: Case, window: int | None) -> torch.Tensor:
    place = torch.arange(case.keys - case.queries, case.keys)[:, None]
    key = torch.arange(case.keys)
    return (key <= place) & (key > place - (window or case.keys + 1))


def _padding(case: Case) -> torch.Tensor:
    """``[B, S]``: left padding, then right padding, then a hole."""
    key = torch.arange(case.keys)
    rows = [key >= case.keys // 3, key < case.keys - case.keys // 4, (key < 2) | (key > case.keys // 2)]
    return torch.stack([rows[index % 3] for index in range(case.batch)])


def visible_keys(case: Case, device: torch.device) -> tuple[VisibleKeys, torch.Tensor]:
    """What a backend is told, and ``[B, H, n, S]`` to be added to the scores, float64."""
    size = (case.batch, case.heads, case.queries, case.keys)
    whole = torch.ones(size, dtype=torch.bool)
    given: torch.Tensor | None = None
    options: dict = {"is_causal": False}
    bias = torch.zeros(size, dtype=torch.float64)
    if case.kind == "causal":
        options, whole = {"aligned_to_end": True}, whole & _placed(case, None)
    elif case.kind == "window":
        options = {"aligned_to_end": True, "sliding_window": case.window}
        whole = whole & _placed(case, case.window)
    elif case.kind == "padding":
        given, options = _padding(case).long(), {"aligned_to_end": True, "sliding_window": case.window}
        whole = whole & _padding(case)[:, None, None] & _placed(case, case.window)
    elif case.kind == "bool":
        given = _padding(case)[:, None, None] & _placed(case, None)[None, None]
        whole = whole & given
    elif case.kind == "bool of all queries":
        given = _padding(case)[:, None, None]
        whole = whole & given
    elif case.kind == "bool of a head":
        given = torch.rand(size) > 0.4
        given[0, 0, 0] = False
        whole = given
    elif case.kind == "nothing":
        given = torch.zeros(case.batch, 1, case.queries, case.keys, dtype=torch.bool)
        given[1:, :, 0] = True
        whole = whole & given
    elif case.kind == "additive":
        given = torch.randn(case.batch, 1, case.queries, case.keys).masked_fill(~_placed(case, None), -math.inf)
        bias, given = bias + given, given.clone()
    elif case.kind == "lowest":
        lowest = torch.finfo(case.dtype).min
        given = torch.zeros(1, 1, case.queries, case.keys, dtype=case.dtype).masked_fill(~_placed(case, None), lowest)
        bias = bias + given.double()
    given = None if given is None else given.to(device)
    visible = VisibleKeys(given, case.queries, case.keys, device, **options)
    return visible, bias.masked_fill(~whole, -math.inf)


KINDS = (
    "none",
    "causal",
    "window",
    "padding",
    "bool",
    "bool of all queries",
    "bool of a head",
    "nothing",
    "additive",
    "lowest",
)


def random_tensors(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and latents; these are rows of a larger buffer, whose free rows must not be read."""
    width = case.rank + case.rope
    query = torch.randn(case.batch, case.heads, case.queries, width)
    buffer = torch.full((case.batch, case.keys + FREE_ROWS, width), math.nan)
    buffer[:, : case.keys] = torch.randn(case.batch, case.keys, width)
    return query.to(device, case.dtype), buffer.to(device, case.dtype)[:, : case.keys]


def expected(
    case: Case, query: torch.Tensor, latents: torch.Tensor, scale: float, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and log-sum-exp in float64, sequence by sequence and head by head."""
    query, latents = query.double().cpu(), latents.double().cpu()
    context = torch.zeros(case.batch, case.heads, case.queries, case.rank, dtype=torch.float64)
    lse = torch.full((case.batch, case.heads, case.queries), -math.inf, dtype=torch.float64)
    for b in range(case.batch):
        for h in range(case.heads):
            scores = query[b, h] @ latents[b].T * scale
            if case.softcap is not None:
                scores = torch.tanh(scores / case.softcap) * case.softcap
            scores = scores + bias[b, h]
            sees = scores.amax(-1) > -math.inf
            lse[b, h, sees] = torch.logsumexp(scores[sees], dim=-1)
            context[b, h, sees] = torch.softmax(scores[sees], dim=-1) @ latents[b, :, : case.rank]
    return context, lse


def check(case: Case, attend, device: torch.device, seed: int = 0) -> None:
    """Compares ``attend`` (`AbsorbedBackend.attend`) with the reference, and asserts that it wrote everything."""
    torch.manual_seed(seed)
    query, latents = random_tensors(case, device)
    visible, bias = visible_keys(case, device)
    scale = 2 / math.sqrt(case.rank + case.rope)
    context, lse = attend(query, latents, case.rank, scale, visible, case.softcap)
    wanted, wanted_lse = expected(case, query, latents, scale, bias)
    assert context.dtype == case.dtype
    assert lse.dtype == torch.float32
    context, lse = context.double().cpu(), lse.double().cpu()
    error = torch.linalg.vector_norm(context - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-30)
    assert error <= TOLERANCES[case.dtype], f"{case}: {error:.2g}"
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-3 if case.dtype != torch.float32 else 1e-5)
