"""The value ridge: a refit of ``o_proj`` on what the converted attention really gathers.

The factorisation measured attention outputs under the source's attention weights. Here the converted layer attends by
itself, and the output projection is regressed on its contexts towards the source's attention output.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layers import AttentionGeometry, AttentionWeights, MLAWeights
from .attention import converted_contexts, source_output
from .base import LayerRefit
from .statistics import ROWS_PER_WINDOW, sample_rows

SHRINKAGE = 0.1
"""Ridge strength, relative to each feature's variance. Of 0.01 to 1 the best on held-out text, where 0.01 overfits."""
SHRINKAGE_FLOOR = 1e-3
"""Added to every feature's variance, relative to the mean variance, before it is scaled by the strength."""


class ValueRidge(LayerRefit):
    """Running moments of contexts ``f`` and source outputs ``y``, each row weighted by ``1 / mean(h^2)``.

    ``h`` is the residual stream after the attention block: what the next norm divides by.
    """

    def __init__(
        self, geometry: AttentionGeometry, weights: AttentionWeights, converted: MLAWeights, seed: int
    ) -> None:
        self.geometry, self.source, self.converted, self.seed = geometry, weights, converted, seed
        self.windows = 0
        features, hidden = converted.o_proj.shape[1], geometry.hidden_size
        self.moment = torch.zeros(features + 1, features + 1 + hidden, dtype=torch.float64)

    def update(self, attention_input: Tensor, residual: Tensor) -> None:
        """See `LayerRefit.update`."""
        for inputs, stream in zip(attention_input.float(), residual.float(), strict=True):
            rows = sample_rows(inputs.shape[0], ROWS_PER_WINDOW, self.seed, self.windows)
            self.windows += 1
            target = source_output(self.geometry, self.source, inputs, rows)
            contexts = converted_contexts(self.geometry, self.converted, inputs, rows)
            features = torch.cat((contexts, contexts.new_ones(len(rows), 1)), dim=1)
            row_weight = 1 / (stream[rows] + target).square().mean(-1, keepdim=True)
            self.moment += (features * row_weight).T @ torch.cat((features, target), dim=1)

    def weights(self) -> MLAWeights:
        """See `LayerRefit.weights`."""
        if not self.windows:
            return self.converted
        size = self.moment.shape[0]
        projection, bias = ridge_towards(self.moment[:, :size], self.moment[:, size:], self.converted.o_proj.double())
        dtype = self.converted.o_proj.dtype
        return replace(self.converted, o_proj=projection.to(dtype), o_proj_bias=bias.to(dtype))


def ridge_towards(feature_moment: Tensor, target_moment: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression with an intercept, shrunk towards ``start`` instead of zero.

    Minimises ``sum_i w_i |y_i - W f_i - b|^2 + tr (W - W_0) L (W - W_0)^T`` with
    ``L = SHRINKAGE * (diag(C_ff) + SHRINKAGE_FLOOR * mean diag(C_ff))``: with little text it stays where it was.

    Args:
        feature_moment: ``[n+1, n+1]``, ``sum_i w_i f~_i f~_i^T`` with ``f~ = [f, 1]``.
        target_moment: ``[n+1, m]``, ``sum_i w_i f~_i y_i^T``.
        start: ``W_0 [m, n]``.

    Returns:
        ``W [m, n]`` and ``b [m]``.
    """
    total = feature_moment[-1, -1]
    mean_feature, mean_target = feature_moment[-1, :-1] / total, target_moment[-1] / total
    covariance = feature_moment[:-1, :-1] / total - mean_feature[:, None] * mean_feature
    cross = target_moment[:-1] / total - mean_feature[:, None] * mean_target
    variance = covariance.diagonal()
    damped = covariance + torch.diag(SHRINKAGE * (variance + SHRINKAGE_FLOOR * variance.mean()))
    correction = torch.linalg.solve(damped, cross - covariance @ start.T)
    projection = start + correction.T
    return projection, mean_target - projection @ mean_feature
