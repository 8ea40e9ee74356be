"""The shared rotary key: complex principal components over kv heads, one frequency (or a few neighbours) at a time.

A complex pair ``k_f`` turns as ``k_f exp(i theta_f j)``, so any complex matrix over the kv heads of one frequency
commutes with the rotation; real orthogonal ones (TransMLA, arXiv 2502.07864, section 4.2) are the special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPLAINED_FLOOR = 1e-4
"""A pair that never needs its rotation still keeps this share of its energy as weight."""


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
        rotation: ``[n_kv, 2, pairs]``, the numerator's real and imaginary parts.
        query_energy: ``[n_kv, pairs]``, the denominator.

    Returns:
        ``[n_kv, pairs]``, complex, of modulus at most 1.
    """
    numerator = torch.complex(rotation[:, 0], rotation[:, 1])
    return numerator / query_energy.clamp_min(torch.finfo(query_energy.dtype).tiny)


def shared_rotary_key(
    keys: Tensor, moment: Tensor, query_energy: Tensor, rho: Tensor, inv_freq: Tensor, components: int, fold: int
) -> RotaryKey:
    """The ``components`` complex directions that carry most of the energy which no constant can explain.

    For each group of ``fold`` adjacent frequencies: the eigenvectors of ``S K Sigma K^H S``, where K stacks the kv
    heads' complex key rows and ``S^2 = energy * (1 - |rho|^2)``. Eigenvalues of all groups compete.

    Args:
        keys: ``[n_kv, pairs, D+1]``, complex key rows.
        moment: ``[D+1, D+1]``, weighted second moment of ``[x, 1]``, not centred: a constant does turn.
        query_energy: ``[n_kv, pairs]``, how strongly queries read each pair.
        rho: ``[n_kv, pairs]``, mean rotations.
        inv_freq: ``[pairs]``.
        components: how many to keep, at most ``n_kv * pairs``.
        fold: 1 keeps every frequency by itself, exact; more lets neighbours share a component at one frequency.
    """
    kv, pairs, width = keys.shape
    if not pairs:
        return RotaryKey(keys.new_zeros(0, width), keys.new_zeros(kv, 0, 0), inv_freq)
    weight = (query_energy * (1 - rho.abs().square()).clamp_min(EXPLAINED_FLOOR)).clamp_min(1e-30).sqrt()
    values, encoders, decoders, frequencies = [], [], [], []
    for first in range(0, pairs, fold):
        group = slice(first, min(first + fold, pairs))
        members = group.stop - group.start
        scale = weight[:, group].reshape(-1, 1)
        rows = scale * keys[:, group].flatten(0, 1)
        hermitian = rows @ moment.to(rows.dtype) @ rows.mH
        eigenvalues, vectors = torch.linalg.eigh(hermitian)
        energy = hermitian.diagonal().real.view(kv, members).sum(0)
        log_frequency = (energy * inv_freq[group].double().log()).sum() / energy.sum()
        spread = torch.zeros(kv, pairs, vectors.shape[1], dtype=keys.dtype)
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
