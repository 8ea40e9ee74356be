"""Tiny random checkpoints of every source family's own Transformers class."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_source import CONTEXT, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

WINDOW = 20
ORIGINAL = CONTEXT // 2
"""Context before a scaling: shorter than what the tests read."""
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.4, 1.5],
    "long_factor": [1.5, 1.2, 2.0, 3.0, 2.5, 4.0],
    "original_max_position_embeddings": ORIGINAL,
}
GRANITE = {
    "attention_bias": True,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
    "rope_parameters": YARN,
}
FAMILIES = {
    "cohere": {"attention_bias": True, "logit_scale": 0.5, "rope_parameters": YARN},
    "cohere-norms": {"use_qk_norm": True, "logit_scale": 2.0, "attention_bias": True, "head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "attention_bias": True,
        "query_pre_attn_scalar": 3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "sliding_window": WINDOW,
        "rope_parameters": YARN,
    },
    "gemma2-uncapped": {
        "head_dim": 16,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention"] * 3,
    },
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_parameters": YARN | {"truncate": False},
    },
    "gemma3_text": {
        "head_dim": 8,
        "attention_bias": True,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 0.1,
        "final_logit_softcapping": 4.0,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": YARN,
        },
    },
    "olmo2": {"attention_bias": True, "rope_parameters": YARN},
    "olmo3": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": YARN,
        },
    },
    "glm4": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    },
    "glm4-unbiased-yarn": {
        "head_dim": 8,
        "attention_bias": False,
        "rope_parameters": YARN | {"partial_rotary_factor": 0.75},
    },
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25},
    },
    "gpt_neox-serial-unbiased": {
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
    },
    "granite": GRANITE,
    "granitemoe": GRANITE | {"num_local_experts": 4},
    "llama": {},
    "llama-longrope": {"head_dim": 12, "rope_parameters": LONGROPE},
    "ministral": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {"sliding_window": WINDOW},
    "mistral-full": {"sliding_window": None, "head_dim": 8},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": WINDOW},
    "phi3-longrope": {
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
    },
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen2_moe-full": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
    "qwen3": {"head_dim": 16},
    "qwen3-biases-windows": {
        "head_dim": 8,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3_moe": {
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "smollm3": {
        "no_rope_layers": [1, 0, 1],
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "starcoder2": {"sliding_window": WINDOW},
    "starcoder2-full": {"use_bias": False},
}
"""By family, and what of it: fields beside those that all share."""


def family_config(family: str, kv_heads: int = 2, **overrides) -> PreTrainedConfig:
    fields = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    return AutoConfig.for_model(family.partition("-")[0], **(fields | FAMILIES[family] | overrides))


def save_family(folder: Path, family: str, kv_heads: int = 2, dtype: torch.dtype = torch.float64, **overrides) -> Path:
    """Writes a checkpoint, norms and biases random as well."""
    torch.manual_seed(0)
    config = family_config(family, kv_heads, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, route: str = "auto") -> PreTrainedModel:
    """A causal model in float64; the route is for MLA models."""
    # The faster ways to run experts know no float64.
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if hasattr(model, "set_attention_route"):
        model.set_attention_route(route)
    return model


def prompts(batch: int, length: int) -> torch.Tensor:
    """Random token ids ``[batch, length]``, no special token among them."""
    return torch.randint(2, 258, (batch, length), generator=torch.Generator().manual_seed(3))
