"""Tiny random models, and a reference that computes them with explicit keys and values."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Cache, PreTrainedModel

from modeling_mla import LlamaMLAConfig, LlamaMLAForCausalLM, MLAConfigMixin, MLAttention
from modeling_mla.qk_norm_mla import NormedMLAttention
from modeling_mla.transformers_seams_mla import ROPE_INIT_FUNCTIONS, cache_argument, cache_of

VOCABULARY = 61
VARIANTS: dict[str, dict] = {
    "plain": {},
    "interleaved": {"rope_interleave": True},
    "q_lora": {"q_lora_rank": 20},
    "q_by_head": {"q_head_dim": 6, "q_bias": True},
    "no_nope": {"qk_nope_head_dim": 0},
    "no_rope": {"qk_rope_head_dim": 0},
    "wide_value": {"v_head_dim": 18, "kv_lora_rank": 7},
    "biases": {"q_bias": True, "kv_a_bias": True, "o_bias": True},
    "q_lora_biases": {"q_lora_rank": 20, "attention_bias": True},
    "scale": {"softmax_scale": 0.71},
    "identity_norm": {"latent_norm": "identity"},
    "shared_row": {"rope_inv_freq": [[0.9, 0.05]], "rope_attention_factor": 1.3},
    "per_layer": {
        "kv_lora_ranks": [5, 16],
        "qk_rope_head_dims": [2, 4],
        "rope_inv_freq": [[0.7], [1.1, 0.02]],
        "latent_norm": "identity",
    },
    "rope_in_one_layer": {"qk_rope_head_dims": [0, 4], "rope_inv_freq": [[], [1.1, 0.02]]},
}
"""Every shape of attention that a configuration can ask for."""

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def tiny_config(config_class: type[MLAConfigMixin] = LlamaMLAConfig, **overrides) -> MLAConfigMixin:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "max_position_embeddings": 256,
        # Large enough that attention is far from uniform.
        "initializer_range": 0.2,
        # Generation would hide every such token that the model happens to say.
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return config_class(**(fields | overrides))


def randomize(model: torch.nn.Module) -> None:
    """Gives norms and biases, which start as ones and zeros, values that matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))


def tiny_model(
    cls: type = LlamaMLAForCausalLM,
    dtype: torch.dtype = torch.float64,
    attn_implementation: str = "sdpa",
    **overrides,
) -> torch.nn.Module:
    torch.manual_seed(0)
    # The faster ways to run experts know no float64.
    options = {"attn_implementation": attn_implementation, "experts_implementation": "eager"}
    model = cls._from_config(tiny_config(cls.config_class, **overrides), **options)
    randomize(model)
    return plain_experts(model.to(dtype).eval())


def plain_experts(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, whose experts are computed one by one: the grouped product knows no float64."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def random_ids(batch: int, length: int) -> torch.Tensor:
    """``[batch, length]``, no padding token among them."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padding(batch: int, length: int) -> torch.Tensor:
    """A mask ``[batch, length]``; row b lacks its first 2b tokens."""
    return (torch.arange(length) >= 2 * torch.arange(batch)[:, None]).long()


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def expanded_weights(attention: MLAttention) -> torch.Tensor:
    """``[H, qk_nope_head_dim + v_head_dim, r]``: the rows of kv_b_proj, head by head."""
    return attention.kv_b_proj.weight.view(
        -1, attention.qk_nope_head_dim + attention.v_head_dim, attention.kv_lora_rank
    )


def _rotate(x: torch.Tensor, inv_freq: torch.Tensor, positions: torch.Tensor, factor: float, interleave: bool):
    """Rotates ``x [S, d]`` as complex numbers."""
    angles = positions[:, None].float() * inv_freq.float()
    half = x.shape[-1] // 2
    real, imaginary = (x[:, 0::2], x[:, 1::2]) if interleave else (x[:, :half], x[:, half:])
    # Transformers computes the table in float32.
    turn = torch.complex((angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype))
    rotated = torch.complex(real, imaginary) * turn
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def reference_attention(
    attention: MLAttention, hidden: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """One sequence ``[S, D]`` through explicit keys and values of every head.

    Args:
        positions: ``[S]``.
        visible: ``[S, S]`` bool, True where the query (row) attends to the key (column).
    """
    config, rank, nope = attention.config, attention.kv_lora_rank, attention.qk_nope_head_dim
    rope, value_dim = attention.qk_rope_head_dim, attention.v_head_dim
    heads = config.num_attention_heads

    if config.rope_inv_freq is not None:
        inv_freq = torch.tensor(config.rope_inv_freq[attention.layer_idx % len(config.rope_inv_freq)])
        factor = config.rope_attention_factor or 1.0
        if config.rope_attention_factors is not None:
            factor = config.rope_attention_factors[attention.layer_idx]
    elif "rope_theta" not in config.rope_parameters:
        kind = config.layer_types[attention.layer_idx]
        grid = copy.copy(config)
        grid.head_dim = rope
        parameters = config.rope_parameters[kind]
        init = ROPE_INIT_FUNCTIONS.get(parameters["rope_type"])
        inv_freq, factor = parameters["rope_theta"] ** (-torch.arange(0, rope, 2).float() / rope), 1.0
        if init is not None:
            inv_freq, factor = init(grid, layer_type=kind)
    else:
        inv_freq = config.rope_parameters["rope_theta"] ** (-torch.arange(0, rope, 2).float() / max(rope, 1))
        factor = 1.0

    if isinstance(attention, NormedMLAttention):
        queries = attention.project_query(hidden[None])[0].transpose(0, 1).flatten(1)
    elif config.q_head_dim is not None:
        maps, narrow = attention.q_head_proj.weight, attention.q_proj(hidden).split(config.q_head_dim, dim=1)
        queries = torch.cat([part @ by.T for part, by in zip(narrow, maps, strict=True)], dim=1)
    elif config.q_lora_rank is None:
        queries = attention.q_proj(hidden)
    else:
        queries = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))
    compressed = attention.project_latent(hidden[None])[0]
    latent, shared_key = compressed[:, :rank], compressed[:, rank:]
    if config.latent_norm == "rms_norm":
        wide = latent.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        latent = attention.kv_a_layernorm.weight * wide.to(latent.dtype)
    shared_key = _rotate(shared_key, inv_freq, positions, factor, config.rope_interleave)

    scale = config.softmax_scale if config.softmax_scale is not None else (nope + rope) ** -0.5
    outputs = []
    for head in range(heads):
        query = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        query_rope = _rotate(query[:, nope:], inv_freq, positions, factor, config.rope_interleave)
        up = expanded_weights(attention)[head]
        key = torch.cat((latent @ up[:nope].T, shared_key), dim=-1)
        scores = torch.cat((query[:, :nope], query_rope), dim=-1) @ key.T * scale
        if config.attention_softcap is not None:
            scores = torch.tanh(scores / config.attention_softcap) * config.attention_softcap
        # A sink has a score and no value.
        sink = attention.sinks[head] if hasattr(attention, "sinks") else scores.new_tensor(float("-inf"))
        scores = torch.cat((scores.masked_fill(~visible, float("-inf")), sink.expand(len(scores), 1)), dim=-1)
        weights = scores.softmax(-1)[:, :-1]
        outputs.append(weights.nan_to_num() @ (latent @ up[nope:].T))
    assert outputs[0].shape[-1] == value_dim
    return attention.o_proj(torch.cat(outputs, dim=-1))


@torch.no_grad()
def reference_logits(
    model: LlamaMLAForCausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    windows: list[int | None] | None = None,
) -> torch.Tensor:
    """``[B, S, vocabulary]`` without cache, routes or masks of Transformers; padding rows are meaningless.

    The body is Transformers' own, with this attention in place of ours.

    Args:
        windows: keys that a query of every layer sees, itself included.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    batch, length = ids.shape
    position_ids = torch.arange(length).expand(batch, -1) if position_ids is None else position_ids
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    windows = windows or [None] * model.config.num_hidden_layers

    def attends(attention: MLAttention, window: int | None):
        def forward(hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
            seen = [(causal & own.bool()).triu(1 - (window or length)) for own in mask]
            rows = zip(hidden_states, position_ids, seen, strict=True)
            return torch.stack([reference_attention(attention, *row) for row in rows]), None

        return forward

    attentions = [layer.self_attn for layer in model.model.layers]
    for attention, window in zip(attentions, windows, strict=True):
        attention.forward = attends(attention, window)
    try:
        return model(ids, position_ids=position_ids, use_cache=False).logits
    finally:
        for attention in attentions:
            del attention.forward


@torch.no_grad()
def decode(model: torch.nn.Module, ids: torch.Tensor, prefix: int = 5, cache: Cache | None = None) -> torch.Tensor:
    """``[B, S, vocabulary]`` from a prefill of ``prefix`` tokens and one step for each further token."""
    output = model(ids[:, :prefix], **cache_argument(cache), use_cache=True)
    parts = [output.logits]
    for step in range(prefix, ids.shape[1]):
        output = model(ids[:, step : step + 1], **cache_argument(cache_of(output)))
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_route = pytest.mark.parametrize("route", ["auto", "absorbed", "expanded"])
