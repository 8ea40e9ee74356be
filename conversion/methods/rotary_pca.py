"""The shared rotary key: complex principal components over kv heads, one frequency (or a few neighbours) at a time.

A complex pair ``k_f`` turns as ``k_f exp(i theta_f j)``, so any complex matrix over the kv heads of one frequency
commutes with the rotation; real orthogonal ones (TransMLA, arXiv 2502.07864, section 4.2) are the special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices.decompositions import eigh

UNEXPLAINED_FLOOR = 1e-4
"""Of a pair's energy: what it weighs at least."""


@dataclass(frozen=True)
class RotaryKey:
    """``m`` rotary components that all heads share.

    ``encoder [m, D+1]`` (complex): component = encoder @ [x, 1]; ``decoder [n_kv, pairs, m]`` (complex): a kv head's
    pairs from the components; ``inv_freq [m]``, radians per token.
    """

    encoder: Tensor
    decoder: Tensor
    inv_freq: Tensor


def as_pairs(rows: Tensor, pairs: int) -> Tensor:
    """Real rows ``[..., d, n]`` to complex pair rows ``[..., pairs, n]``: channels ``(f, f + pairs)``."""
    return torch.complex(rows[..., :pairs, :], rows[..., pairs : 2 * pairs, :])


def from_pairs(rows: Tensor) -> Tensor:
    """Inverse of `as_pairs`: ``[..., pairs, n]`` to ``[..., 2*pairs, n]``."""
    return torch.cat((rows.real, rows.imag), dim=-2)


def mean_rotation(rotation: Tensor, query_energy: Tensor) -> Tensor:
    """``rho = sum W |q_f|^2 exp(-i theta_f D) / sum W |q_f|^2``, the constant that best stands for a pair's rotation.

    The weighted least-squares answer for ``min_rho sum W |q_f|^2 |exp(-i theta_f D) - rho|^2``.

    Args:
        rotation: ``[H, 2, pairs]``, the numerator's real and imaginary parts.
        query_energy: ``[H, pairs]``, the denominator.

    Returns:
        ``[H, pairs]``, complex, of modulus at most 1.
    """
    numerator = torch.complex(rotation[:, 0], rotation[:, 1])
    return numerator / query_energy.clamp_min(torch.finfo(query_energy.dtype).tiny)


def unexplained_energy(query_energy: Tensor, rho: Tensor) -> Tensor:
    """``e (1 - |rho|^2)``: what is left of a pair's energy ``e`` when the constant ``rho`` stands for its rotation.

    The minimum of the problem of `mean_rotation`. A pair that hardly needs its rotation keeps a little weight.
    """
    return query_energy * (1 - rho.abs().square()).clamp_min(UNEXPLAINED_FLOOR)


def mean_rotation_matrix(rho: Tensor, head_dim: int) -> Tensor:
    """``[..., pairs]``, complex, to the real ``[..., d, d]`` that multiplies pairs by it and keeps other channels."""
    pairs = rho.shape[-1]
    matrix = torch.eye(head_dim, dtype=rho.real.dtype, device=rho.device).expand(*rho.shape[:-1], -1, -1).clone()
    real, imaginary = torch.diag_embed(rho.real), torch.diag_embed(rho.imag)
    matrix[..., : 2 * pairs, : 2 * pairs] = torch.cat(
        (torch.cat((real, -imaginary), dim=-1), torch.cat((imaginary, real), dim=-1)), dim=-2
    )
    return matrix


def shared_rotary_key(
    keys: Tensor, moment: Tensor, weight: Tensor, inv_freq: Tensor, components: int, fold: int
) -> RotaryKey:
    """The ``components`` complex directions that carry most of the energy which no constant can explain.

    For each group of ``fold`` adjacent frequencies: the eigenvectors of ``S K Sigma K^H S``, where K stacks the kv
    heads' complex key rows and ``S^2`` the weights. Eigenvalues of all groups compete.

    Args:
        keys: ``[n_kv, pairs, D+1]``, complex key rows.
        moment: ``[D+1, D+1]``, weighted second moment of ``[x, 1]``, not centred: a constant does turn.
        weight: ``[n_kv, pairs]``, of `unexplained_energy`, summed over the query heads that read each pair.
        inv_freq: ``[pairs]``.
        components: how many to keep, at most ``n_kv * pairs``.
        fold: 1 keeps every frequency by itself, exact; more lets neighbours share a component at one frequency.
    """
    kv, pairs, width = keys.shape
    if not pairs:
        return RotaryKey(keys.new_zeros(0, width), keys.new_zeros(kv, 0, 0), inv_freq)
    root = weight.clamp_min(1e-30).sqrt()
    values, encoders, decoders, frequencies = [], [], [], []
    for first in range(0, pairs, fold):
        group = slice(first, min(first + fold, pairs))
        members = group.stop - group.start
        scale = root[:, group].reshape(-1, 1)
        rows = scale * keys[:, group].flatten(0, 1)
        hermitian = rows @ moment.to(rows.dtype) @ rows.mH
        eigenvalues, vectors = eigh(hermitian)
        energy = hermitian.diagonal().real.view(kv, members).sum(0)
        if not energy.sum():
            # Dead keys: what turns at no energy may turn at any frequency.
            energy = torch.ones_like(energy)
        log_frequency = (energy * inv_freq[group].double().log()).sum() / energy.sum()
        spread = keys.new_zeros(kv, pairs, vectors.shape[1])
        spread[:, group] = (vectors / scale).view(kv, members, -1)
        values.append(eigenvalues)
        encoders.append(vectors.mH @ rows)
        decoders.append(spread)
        frequencies.append(log_frequency.exp().expand(vectors.shape[1]))
    keep = torch.cat(values).argsort(descending=True, stable=True)[:components]
    return RotaryKey(
        encoder=torch.cat(encoders)[keep],
        decoder=torch.cat(decoders, dim=2)[:, :, keep],
        inv_freq=torch.cat(frequencies)[keep].to(inv_freq.dtype),
    )


def table_rotary_key(keys: Tensor, moment: Tensor, weight: Tensor, inv_freq: Tensor, components: int) -> RotaryKey:
    """One component for every frequency of a table that holds each ``pairs / components``-th of the source's.

    Each is the leading direction of `shared_rotary_key` at its frequency; the components are in the order of the table.

    Args:
        keys: as of `shared_rotary_key`.
        moment: the same.
        weight: the same.
        inv_freq: of the source.
        components: frequencies of the table, which divide the source's pairs.
    """
    kv, pairs, width = keys.shape
    if not pairs:
        return RotaryKey(keys.new_zeros(0, width), keys.new_zeros(kv, 0, 0), inv_freq)
    kept = torch.arange(0, pairs, pairs // components, device=keys.device)
    root = weight[:, kept].clamp_min(1e-30).sqrt().mT
    rows = root[..., None] * keys[:, kept].transpose(0, 1)
    _, vectors = eigh(rows @ moment.to(rows.dtype) @ rows.mH)
    leading = vectors[..., -1]
    decoder = keys.new_zeros(kv, pairs, components)
    decoder[:, kept, torch.arange(components, device=keys.device)] = (leading / root).mT
    return RotaryKey((leading.conj()[:, None] @ rows)[:, 0], decoder, inv_freq[kept])


def rotary_queries(groups: int, queries: Tensor, key: RotaryKey) -> Tensor:
    """Query rows that meet the shared key: ``q_c = sum_f q_f conj(u_fc)`` for each head.

    Args:
        groups: query heads that share a kv head.
        queries: ``[H, pairs, n]``, complex query rows.
        key: the shared rotary key.

    Returns:
        ``[H, 2*m, n]``, real: real parts of the components, then imaginary parts.
    """
    decoder = key.decoder.repeat_interleave(groups, dim=0)
    return from_pairs(decoder.mH @ queries)
