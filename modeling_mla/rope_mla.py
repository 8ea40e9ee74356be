"""The rotary half of the query and the shared rotary key: frequencies, angles, rotation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from typing_extensions import override

from .rope_extension_mla import rope_extension
from .transformers_seams_mla import ROPE_INIT_FUNCTIONS, dynamic_rope_update, init


class MLARotaryEmbedding(nn.Module):
    """Cosines and sines for ``qk_rope_head_dim`` channels of every layer, from one position table.

    Layers that rotate alike share one row of ``inv_freq``; a compressed conversion has a row a layer. Frequencies
    that the configuration does not list follow ``rope_parameters`` by Transformers' own functions, every type of
    them, as if ``qk_rope_head_dim`` were the head size.

    Attributes:
        attention_scaling: the factor for cos and sin, or ``[rows, 1]`` where rows differ in it.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor
    attention_scaling: float | torch.Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = _rotary_config(config)
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings

        # Explicit frequencies contain whatever scaling the source had.
        explicit = config.rope_inv_freq is not None
        if not explicit:
            # Of these channels all are rotated, whatever share a body of the family rotates.
            self.config.rope_parameters = dict(config.rope_parameters) | {"partial_rotary_factor": 1.0}
        self.rope_type = "default" if explicit else config.rope_parameters["rope_type"]
        init_function: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init_function = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, scaling = init_function(self.config)
        self.attention_scaling = nn.Buffer(scaling, persistent=False) if isinstance(scaling, torch.Tensor) else scaling
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def init_mla_weights(self, std: float) -> None:
        """Sets the factors that differ by layer, a buffer that no checkpoint has; ``std`` is not read."""
        if isinstance(self.attention_scaling, torch.Tensor):
            _, scaling = self.compute_default_rope_parameters(self.config)
            init.copy_(self.attention_scaling, scaling)

    @staticmethod
    def compute_default_rope_parameters(
        config: PreTrainedConfig, **kwargs
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Unscaled or explicit inverse frequencies, and the factor for cos and sin.

        Returns:
            ``[rows, d/2]`` float32, rows of layers with fewer channels padded by zeros, the rows for long texts behind
            the others; the factor, or ``[rows, 1]``.
        """
        if config.rope_inv_freq is not None:
            width = config.qk_rope_head_dim // 2
            rows = config.rope_inv_freq + (config.rope_long_inv_freq or [])
            rows = [row + [0.0] * (width - len(row)) for row in rows]
            factor = 1.0 if config.rope_attention_factor is None else config.rope_attention_factor
            if config.rope_attention_factors is not None:
                factor = torch.tensor(config.rope_attention_factors, dtype=torch.float32)[:, None]
            inv_freq = torch.tensor(rows, dtype=torch.float32).view(len(rows), width)
            extension = rope_extension(config)
            return inv_freq if extension is None else extension.apply(inv_freq), factor
        dim = config.qk_rope_head_dim
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / max(dim, 1)
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @override
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at the positions.

        Args:
            x: gives dtype and device.
            position_ids: ``[B, S]``.
            layer_type: what some bodies ask for, kind after kind; the rows of all layers serve every kind.

        Returns:
            cos and sin, each ``[B, S, rows, d/2]``.
        """
        return self._angles(x, position_ids)

    @torch.no_grad()
    @dynamic_rope_update
    def _angles(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq, scaling = self.inv_freq.to(device=x.device, dtype=torch.float32), self.attention_scaling
        if isinstance(scaling, torch.Tensor):
            scaling = scaling.to(device=x.device, dtype=torch.float32)
        if self.config.rope_long_inv_freq is not None:
            # As Transformers chooses (longrope): by the last position of the batch, for all positions.
            original = self.config.rope_parameters["original_max_position_embeddings"]
            short, long = inv_freq.chunk(2)
            inv_freq = torch.where(position_ids.max() >= original, long, short)
        angles = position_ids[..., None, None].float() * torch.atleast_2d(inv_freq)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


class ByLayerType(nn.Module):
    """First base beside a body's rotary module whose kinds of layers rotate by parameters of their own (Gemma 3).

    For frequencies that the configuration does not list. Angles are those of the kind that is asked for, in one row.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(_rotary_config(config))

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MLARotaryEmbedding.forward`."""
        cos, sin = (table.chunk(2, dim=-1)[0].unsqueeze(2) for table in super().forward(x, position_ids, layer_type))
        return cos, sin


def _rotary_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """As the functions of Transformers want it, which take the number of channels from `head_dim`."""
    rotary = copy.copy(config)
    rotary.head_dim = config.qk_rope_head_dim
    return rotary


def layer_angles(
    position_embeddings: tuple[torch.Tensor, torch.Tensor], layer_idx: int, rope_dim: int, widest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cos and sin ``[B, S, rope_dim/2]`` of one layer, from what :class:`MLARotaryEmbedding` returned.

    No shape decides: an engine that reads the graph knows none.

    Args:
        position_embeddings: cos and sin, ``[B, S, rows, widest/2]``.
        layer_idx: which layer's.
        rope_dim: its rotary channels.
        widest: those of the widest layer.
    """
    cos, sin = position_embeddings
    row, width = layer_idx % cos.shape[2], rope_dim // 2
    cos, sin = cos.select(2, row), sin.select(2, row)
    return (cos, sin) if rope_dim == widest else (cos[..., :width], sin[..., :width])


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Rotates every pair of channels by its angle (RoFormer, arXiv 2104.09864, equation 34).

    Args:
        x: ``[B, heads, S, d]``.
        cos: ``[B, S, d/2]``.
        sin: the same.
        interleave: pairs are channels ``(2f, 2f+1)``; else ``(f, f + d/2)``.

    Returns:
        ``[B, heads, S, d]``, half-split in either case: scores do not depend on the order of channels, and every
        reader of the cache then sees one layout.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1)
