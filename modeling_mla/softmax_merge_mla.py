"""Attention to several sets of keys, merged from attention to each by the log-sum-exp of its scores."""

from __future__ import annotations

import torch


def merge_attended(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two disjoint sets of keys from attention to each.

    Args:
        first: ``[..., d]``, the normalised output over one set.
        first_lse: ``[...]``, log-sum-exp of its scores, ``-inf`` where nothing was visible.
        second: the output over the other set.
        second_lse: of its scores.

    Returns:
        The output over both sets, and its log-sum-exp.
    """
    lse = torch.logaddexp(first_lse, second_lse)
    finite = finite_lse(lse)
    first = first * torch.exp(first_lse - finite).unsqueeze(-1)
    return first + second * torch.exp(second_lse - finite).unsqueeze(-1), lse


def sink_share(lse: torch.Tensor, s_aux: torch.Tensor) -> torch.Tensor:
    """What attention sinks, a logit a head ``[H]``, leave of an output without them: ``[B, H, n, 1]`` from ``lse``."""
    return torch.sigmoid(lse - s_aux[:, None]).unsqueeze(-1)


def finite_lse(lse: torch.Tensor) -> torch.Tensor:
    """``lse``, of any shape, with 0 for ``-inf``: a row that sees nothing (left padding) then has zeros, not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
