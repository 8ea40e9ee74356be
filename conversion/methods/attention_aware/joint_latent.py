"""The joint latent: one low-rank code for un-rotated keys and values that loses least of what attention outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...devices.decompositions import eigh

DAMPING = 1e-4
"""Of a metric's largest eigenvalue, added to all: directions that the text hardly used are kept finite."""


@dataclass(frozen=True)
class JointLatent:
    """``down [r, D+1]``: latent = down @ [x, 1]; ``up_key`` and ``up_value [n_kv, d, r]`` rebuild keys and values."""

    down: Tensor
    up_key: Tensor
    up_value: Tensor


def metric_roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of ``metric [..., d, d]`` after damping, and their inverses."""
    eigenvalues, vectors = eigh(metric)
    eigenvalues = eigenvalues.clamp_min(0)
    damped = (eigenvalues + DAMPING * eigenvalues[..., -1:]).clamp_min(1e-30).sqrt()
    return (vectors * damped[..., None, :]) @ vectors.mH, (vectors / damped[..., None, :]) @ vectors.mH


def centred(moment: Tensor) -> Tensor:
    """The weighted covariance of ``[x, 1]`` from its second moment: the constant's row and column become zero.

    A constant in an un-rotated key moves a whole score row, which softmax ignores; one in a value is an output bias.
    """
    return moment - moment[:, -1:] @ moment[-1:] / moment[-1, -1]


def latent_targets(
    keys: Tensor, values: Tensor, key_metric: Tensor, value_metric: Tensor, key_gain: float
) -> tuple[Tensor, Tensor]:
    """Keys and values in units of attention output, stacked ``[2*n_kv*d, D+1]``, and the map back to plain units.

    The map back is ``[2*n_kv, d, d]``, one block for each block of rows.
    """
    key_root, key_inverse = metric_roots(key_metric)
    value_root, value_inverse = metric_roots(value_metric)
    targets = torch.cat((key_gain * key_root @ keys, value_root @ values)).flatten(0, 1)
    return targets, torch.cat((key_inverse / key_gain, value_inverse))


def latent_spectrum(targets: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of ``T Sigma T^T``: the loss of cutting at r is their tail sum.

    ``targets [m, D+1]`` are those of `latent_targets`; ``moment [D+1, D+1]`` is `centred` where constants cost nothing.
    """
    covariance = targets @ moment @ targets.mT
    eigenvalues, vectors = eigh((covariance + covariance.mT) / 2)
    return eigenvalues.flip(-1).clamp_min(0), vectors.flip(-1)


def joint_latent(targets: Tensor, plain_units: Tensor, moment: Tensor, rank: int) -> JointLatent:
    """The best ``rank`` linear code of the targets (Eckart-Young in the metric of `latent_targets`).

    Weighting a factorisation by the data's second moment is SVD-LLM's whitening (arXiv 2403.07378); here the outputs
    have metrics too, and the tokens weights.
    """
    _, vectors = latent_spectrum(targets, moment)
    leading = vectors[:, :rank]
    blocks, d, _ = plain_units.shape
    up = plain_units @ leading.view(blocks, d, rank)
    return JointLatent(down=leading.mT @ targets, up_key=up[: blocks // 2], up_value=up[blocks // 2 :])
