"""The value ridge: a refit of ``o_proj`` on what the converted attention really gathers.

The factorisation measured attention outputs under the source's attention weights, on the source's activations. Here
the converted layer attends by itself, in a model whose earlier layers are converted too, and its output projection is
regressed on its contexts: towards the source's attention output, and part of the way to where the source's residual
stream is, which those layers have left (asymmetric calibration, as in GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from ...devices.running_sums import RunningSums
from ...forward.attention import converted_contexts, source_output
from ...layers import AttentionGeometry, AttentionWeights, MLAWeights
from ..base import LayerInputs, LayerRefit

SHRINKAGE = 0.03
"""Ridge strength, relative to each feature's variance. Between 0.01 and 0.1 held-out text hardly tells a difference."""
SHRINKAGE_FLOOR = 1e-3
"""Added to every feature's variance, relative to the mean variance, before it is scaled by the strength."""
_SMALLEST_POWER = 1e-20
"""Of a row: a dead layer's has none to divide by."""
CORRECTED_SHARE = 0.5
"""Of the distance that earlier layers left between the residual streams: on held-out text better than none or all."""


class ValueRidge(LayerRefit):
    """Running moments of contexts ``f`` and targets ``y + CORRECTED_SHARE * (h - h')``, each row weighted.

    ``y`` is the source's attention output, ``h`` and ``h'`` the residual streams that enter the source's layer and the
    converted one, in units of ``y`` where that is scaled on its way there. A row weighs ``1 / mean((h + y)^2)``: what
    the next norm divides by. Where that norm comes before the addition, the target is ``y`` and a row weighs
    ``1 / mean(y^2)``.
    """

    def __init__(self, geometry: AttentionGeometry, weights: AttentionWeights, converted: MLAWeights) -> None:
        self.geometry, self.source, self.converted = geometry, weights, converted
        features, hidden = converted.o_proj.shape[1], geometry.hidden_size
        self.sums = RunningSums(converted.o_proj.device, moment=(features + 1, features + 1 + hidden))

    @override
    def update(self, source: LayerInputs, converted: LayerInputs) -> Tensor:
        output = source_output(self.geometry, self.source, source.attention_input)
        contexts = converted_contexts(self.geometry, self.converted, converted.attention_input)
        features = torch.cat((contexts, contexts.new_ones(len(contexts), 1)), dim=1)
        if self.geometry.output_is_normed:
            target = normed = output
        else:
            scale = self.geometry.output_scale
            target = output + CORRECTED_SHARE * (source.residual - converted.residual) / scale
            normed = source.residual / scale + output
        row_weight = 1 / normed.square().mean(-1, keepdim=True).clamp_min(_SMALLEST_POWER)
        self.sums.add("moment", (features * row_weight).T @ torch.cat((features, target), dim=1))
        return contexts

    @override
    def weights(self) -> MLAWeights:
        moment, start = self.sums.tensors()["moment"], self.converted.o_proj
        size = moment.shape[0]
        if not moment[-1, size - 1]:
            return self.converted
        free = self.converted.o_proj_bias is not None
        sums = (moment[:, :size], moment[:, size:], start.to(moment.device).double())
        projection, bias = ridge_towards(*sums, intercept=free)
        return replace(self.converted, o_proj=projection.to(start), o_proj_bias=bias.to(start) if free else None)


def ridge_towards(
    feature_moment: Tensor, target_moment: Tensor, start: Tensor, *, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """Ridge regression with an intercept, or through the origin, shrunk towards ``start`` instead of zero.

    Minimises ``sum_i w_i |y_i - W f_i - b|^2 + tr (W - W_0) L (W - W_0)^T`` with
    ``L = SHRINKAGE * (diag(C_ff) + SHRINKAGE_FLOOR * mean diag(C_ff))``: with little text it stays where it was.

    Args:
        feature_moment: ``[n+1, n+1]``, ``sum_i w_i f~_i f~_i^T`` with ``f~ = [f, 1]``.
        target_moment: ``[n+1, m]``, ``sum_i w_i f~_i y_i^T``.
        start: ``W_0 [m, n]``.
        intercept: whether there is one.

    Returns:
        ``W [m, n]`` and ``b [m]``, zeros without an intercept.
    """
    total = feature_moment[-1, -1]
    mean_feature, mean_target = feature_moment[-1, :-1] / total, target_moment[-1] / total
    if not intercept:
        mean_feature, mean_target = torch.zeros_like(mean_feature), torch.zeros_like(mean_target)
    covariance = feature_moment[:-1, :-1] / total - mean_feature[:, None] * mean_feature
    cross = target_moment[:-1] / total - mean_feature[:, None] * mean_target
    variance = covariance.diagonal()
    if not variance.any():
        # Dead values: there is nothing to regress on.
        return start, mean_target - start @ mean_feature
    damped = covariance + torch.diag(SHRINKAGE * (variance + SHRINKAGE_FLOOR * variance.mean()))
    correction = torch.linalg.solve(damped, cross - covariance @ start.T)
    projection = start + correction.T
    return projection, mean_target - projection @ mean_feature
