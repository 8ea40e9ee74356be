"""A converted model as one of DeepSeek's, tensor by tensor: what all targets that read that form have in common.

What such a model has and a converted one has not is made harmless, exactly in real numbers:

- Its latent norm divides by the root of the mean square plus epsilon. Where epsilon outweighs the mean square, it
  divides by epsilon's own root, which the norm's weight multiplies back.
- Every engine gives that norm the body's epsilon (Transformers 1e-6), so the body's is chosen. A residual stream ``s``
  times as large is normalised by ``s**2`` times the epsilon: embeddings, ``o_proj`` and ``down_proj`` are scaled by
  ``s``, and what reads the stream last makes up for it.
- Its scale of scores is that of its head size; queries make up for it.
- Its sizes: zeros fill up ranks and heads, and rotary pairs take their places in a table of 32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import SourceError
from ..planning.deepseek_layout import QK_ROPE_HEAD_DIM
from .attention_facts import Rotation, attention_layers
from .padding import pad_parts, placed_pairs

INSTEAD = "serve the model with Transformers or mlx-lm (mla export --to mlx)"
_PAIRS = QK_ROPE_HEAD_DIM // 2
_BODIES = ("llama", "ministral", "mistral", "phi3", "smollm3")
"""Families whose bodies are DeepSeek's dense one: two RMSNorms a layer, gated SiLU, no multipliers."""
_ATTENTION = re.compile(r"(model\.layers\.(\d+)\.self_attn\.)(\w+)\.(?:weight|bias)")
_SAME_FREQUENCY = 1e-5
"""Of a frequency of DeepSeek's table: within rounding in float32."""


@dataclass(frozen=True)
class DeepseekForm:
    """One model in DeepSeek's form.

    Args:
        before: the configuration of the converted model.
        rank: of every layer, padded to.
        nope: un-rotated channels of a head, padded to.
        value: channels of a head's value, padded to.
        epsilon: of all norms.
        latent_scales: by layer, what latents are multiplied by, for epsilon to outweigh them.
        places: by layer, of rotary frequencies in DeepSeek's table.
        scales: by layer, of the scores.
    """

    before: PreTrainedConfig
    rank: int
    nope: int
    value: int
    epsilon: float
    latent_scales: list[float]
    places: list[list[int]]
    scales: list[float]

    @property
    def stream(self) -> float:
        """How many times as large the residual stream is."""
        return (self.epsilon / self.before.rms_norm_eps) ** 0.5

    def tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What becomes of one tensor, of any shape; the head and the last norm are left to the target."""
        if name == "model.embed_tokens.weight" or name.endswith(".mlp.down_proj.weight"):
            return {name: scaled(tensor, self.stream)}
        if name.endswith(".mlp.gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            prefix = name.removesuffix("gate_up_proj.weight")
            return {f"{prefix}gate_proj.weight": gate.contiguous(), f"{prefix}up_proj.weight": up.contiguous()}
        match = _ATTENTION.fullmatch(name)
        return {name: tensor if match is None else self._projection(match.group(3), int(match.group(2)), tensor)}

    def _projection(self, kind: str, layer: int, tensor: Tensor) -> Tensor:
        before, places = self.before, self.places[layer]
        heads = before.num_attention_heads
        nope, value = (before.layer_qk_nope_head_dim(layer), self.nope), (before.v_head_dim, self.value)
        latent, latent_scale = (before.layer_kv_lora_rank(layer), self.rank), self.latent_scales[layer]
        if kind == "q_proj":
            plain, rotary = tensor.unflatten(0, (heads, -1)).tensor_split([nope[0]], dim=1)
            wide = torch.cat((pad_parts(plain, 1, [nope]), placed_pairs(rotary, 1, places, _PAIRS)), dim=1)
            return scaled(wide.flatten(0, 1), self.scales[layer] * (self.nope + QK_ROPE_HEAD_DIM) ** 0.5)
        if kind == "kv_a_proj_with_mqa":
            plain, rotary = tensor.tensor_split([latent[0]])
            plain = scaled(pad_parts(plain, 0, [latent]), latent_scale)
            return torch.cat((plain, placed_pairs(rotary, 0, places, _PAIRS)))
        if kind == "kv_a_layernorm":
            dtype = torch.bfloat16 if before.dtype == torch.bfloat16 else torch.float32
            weight = self.epsilon**0.5 / latent_scale
            return torch.full((self.rank,), weight, dtype=dtype, device=tensor.device)
        if kind == "kv_b_proj":
            per_head = pad_parts(tensor.unflatten(0, (heads, -1)), 1, [nope, value]).flatten(0, 1)
            return pad_parts(per_head, 1, [latent])
        wide = pad_parts(tensor.unflatten(1, (heads, -1)), 2, [value]).flatten(1, 2)
        return scaled(wide, self.stream)


def deepseek_form(
    config: PreTrainedConfig, rank: int, nope: int, value: int, epsilon: float, latent_scales: list[float]
) -> DeepseekForm:
    """The form of a model, for a target's sizes and epsilon.

    Raises:
        SourceError: DeepSeek's form cannot hold the model.
    """
    reason = why_no_deepseek(config)
    if reason is not None:
        raise SourceError(f"{reason}; {INSTEAD}.")
    attentions, rotations = attention_layers(config)
    places = [_places(config, layer, rotation) for layer, rotation in enumerate(rotations)]
    scales = [attention.scaling for attention in attentions]
    return DeepseekForm(config, rank, nope, value, epsilon, latent_scales, places, scales)


def why_no_deepseek(config: PreTrainedConfig) -> str | None:
    """What a model of this library has that DeepSeek's dense ones have not, whatever its sizes; None for nothing."""
    family = config.model_type.removesuffix("_mla")
    if getattr(config, "qk_norm_head_dim", None) is not None:
        return f"{family} normalises queries and keys, which DeepSeek's models do not"
    if family not in _BODIES:
        return f"{family} has another body than DeepSeek's dense layers"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}, and engines compute silu in DeepSeek's models"
    if getattr(config, "mlp_bias", False):
        return "mlp_bias is True, and DeepSeek's MLP has no biases"
    for name in ("q_bias", "kv_a_bias", "o_bias"):
        if getattr(config, name):
            return (
                f"{name} is True, and engines drop the biases of DeepSeek's attention unseen; convert the source with "
                "--layout deepseek, or"
            )
    if config.q_lora_rank is not None:
        return f"q_lora_rank is {config.q_lora_rank}, whose norm has another epsilon in each engine"
    if config.latent_norm != "identity":
        return "latents are normalised, by another epsilon in each engine"
    if config.latent_code is not None:
        return "latent_code keeps the cache in few bits, which engines do not; convert with --latent-bits 16, or"
    if config.dtype == torch.float16:
        return "float16 cannot hold what makes the latent norm harmless; convert with --dtype bfloat16, or"
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds):
        return f"the sliding window is {window} tokens, which engines drop in DeepSeek's models"
    if config.rope_interleave:
        return "rope_interleave is True; only half-split pairs are put into DeepSeek's places"
    factors = [config.rope_attention_factor or 1.0, *(config.rope_attention_factors or [])]
    scaling = config.rope_parameters["rope_type"]
    if scaling != "default" or any(factor != 1 for factor in factors):
        return f"frequencies are scaled by {scaling!r}, which engines read as yarn in DeepSeek's models"
    return None


def _places(config: PreTrainedConfig, layer: int, rotation: Rotation) -> list[int]:
    """The places of a layer's rotary frequencies in DeepSeek's table."""
    if rotation.inv_freq.numel() == 0:
        return []
    exponents = torch.arange(0, QK_ROPE_HEAD_DIM, 2, dtype=torch.float64) / QK_ROPE_HEAD_DIM
    table = config.rope_parameters["rope_theta"] ** -exponents
    off = (rotation.inv_freq.double()[:, None] / table - 1).abs()
    places = off.argmin(1).tolist()
    if off.min(1).values.max() > _SAME_FREQUENCY or len(set(places)) < len(places):
        raise SourceError(
            f"the rotary frequencies of layer {layer} are not {len(places)} different ones of DeepSeek's table for "
            f"rope_theta {config.rope_parameters['rope_theta']:g}; convert the source with --layout deepseek."
        )
    return places


def scaled(tensor: Tensor, by: float) -> Tensor:
    """A tensor of any shape times a number, in the tensor's type, rounded once."""
    return tensor if by == 1 else (tensor.double() * by).to(tensor.dtype)
