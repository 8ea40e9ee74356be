"""The currency of a conversion: one attention layer before, and the same layer after.

Source adapters make :class:`AttentionWeights`, methods turn them into :class:`MLAWeights`, the shard writer
stores those. Nothing here knows a file format, a family or a factorisation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor

from modeling_mla.latent_code_mla import EXACT, LatentCode, PartCode


@dataclass(frozen=True)
class AttentionGeometry:
    """Sizes and constants of one source attention layer.

    ``inv_freq`` are the *final* rotary inverse frequencies, after any scaling, in float32, one for each rotary
    pair: pair ``f`` is channels ``(f, f + rotary_dim // 2)`` of a head (half-split layout), the channels from
    ``rotary_dim`` on are not rotated. ``attention_factor`` multiplies cos and sin (YaRN); ``softmax_scale``
    multiplies scores. ``sliding_window`` counts visible keys, the current token included; None is full attention.
    ``softcap`` bounds scores: ``softcap * tanh(score / softcap)``. ``output_is_normed`` says that the attention output
    is normalised before it is added to the residual stream; ``output_scale`` multiplies it there. ``long_inv_freq``
    takes the place of ``inv_freq`` beyond the original context, which no calibration text is. ``behind_norms`` says
    that the source normalises queries and keys, and its maps stand behind that: see `AttentionWeights`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_freq: Tensor
    softmax_scale: float
    attention_factor: float = 1.0
    sliding_window: int | None = None
    softcap: float | None = None
    output_is_normed: bool = False
    behind_norms: bool = False
    output_scale: float = 1.0
    long_inv_freq: Tensor | None = None

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return 2 * int(self.inv_freq.numel())

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def cache_elements(self) -> int:
        """Values that the source caches for one token in this layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class AttentionWeights:
    """One source attention layer, un-fused, rotary pairs half-split, `nn.Linear` orientation ``[out, in]``.

    ``q [H*d, D]``, ``k [n_kv*d, D]``, ``v [n_kv*d, D]``, ``o [D, H*d]``; biases and sinks where the source has them.
    ``sinks [H]`` are one logit a head that takes its share of the softmax and has no value.

    They are linear maps of the *attention input*, what the source adapter's ``attention_input`` gives. Where a source
    normalises queries and keys, that has been done there: its attention input is queries, keys and values themselves,
    side by side. Then ``q [H*d, d]`` maps every head's own query, and ``k`` and ``v`` ``[n_kv*d, 2*n_kv*d]`` select
    from the rest (`encoder_input`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    sinks: Tensor | None = None


def encoder_input(inputs: Tensor, encoder_map: Tensor) -> Tensor:
    """The columns of the attention input that a key, value or latent map ``[out, D_e]`` reads: the last ``D_e``."""
    return inputs[..., inputs.shape[-1] - encoder_map.shape[1] :]


@dataclass(frozen=True)
class LayerBudget:
    """What one converted layer may cache for a token: ``kv_lora_rank + qk_rope_head_dim`` values in so many bits.

    16 bits are values in the model's type. ``deepseek`` holds the layer to the form of DeepSeek's: one rotary component
    for each frequency of its table, in the table's order, and no constants.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    latent_bits: int = EXACT
    rope_bits: int = EXACT
    deepseek: bool = False

    @property
    def cache_elements(self) -> int:
        """Values that the converted layer caches for one token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def code(self) -> LatentCode | None:
        """How the layer caches, one scale a token for each part; None where nothing is coded.

        What prepares a latent is folded into the weights. Rotary keys turn, so theirs is applied when they are cached.
        """
        if self.latent_bits == self.rope_bits == EXACT:
            return None
        segments = ((self.qk_rope_head_dim, self.rope_bits),) if self.qk_rope_head_dim else ()
        rope = PartCode(segments, rotated=bool(segments) and self.rope_bits != EXACT)
        return LatentCode(PartCode(((self.kv_lora_rank, self.latent_bits),)), rope)

    @property
    def rank_step(self) -> int:
        """Channels whose bits are a whole even number of bytes, as rows of codes are."""
        return 1 if self.latent_bits == EXACT else 16 // gcd(16, self.latent_bits)

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes of a token behind the first ones; ``itemsize`` is that of the model's type."""
        code = self.code
        return self.cache_elements * itemsize if code is None else code.nbytes


@dataclass(frozen=True)
class MLAWeights:
    """One converted attention layer, DeepSeek's names and layout, `nn.Linear` orientation.

    ``q_proj [H*(d_n+d_r), D]`` (per head: un-rotated part, then rotated part), ``kv_a_proj_with_mqa [r+d_r, D]``
    (latent, then shared rotary key), ``kv_b_proj [H*(d_n+d_v), r]`` (per head: key, then value), ``o_proj [D, H*d_v]``.
    The first two read what the source's maps read, each head's own query behind norms. ``inv_freq`` has ``d_r / 2``
    entries; pair ``f`` of the rotary part is channels ``(f, f + d_r/2)``. ``sinks`` are the source's. ``code`` is how
    latent and rotary key are cached; None is the model's type.
    """

    q_proj: Tensor
    kv_a_proj_with_mqa: Tensor
    kv_b_proj: Tensor
    o_proj: Tensor
    inv_freq: Tensor
    qk_nope_head_dim: int
    v_head_dim: int
    q_proj_bias: Tensor | None = None
    kv_a_proj_with_mqa_bias: Tensor | None = None
    o_proj_bias: Tensor | None = None
    sinks: Tensor | None = None
    code: LatentCode | None = None


AnyLayer = TypeVar("AnyLayer", AttentionWeights, MLAWeights)


def moved(layer: AnyLayer, device: torch.device | str) -> AnyLayer:
    """The same layer with its tensors on ``device``."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    tensors: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(layer, **tensors)
