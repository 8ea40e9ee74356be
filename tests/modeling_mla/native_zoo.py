"""A tiny random model of every native MLA class, each with the quirks that its releases have."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

BODY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
INDEXER = {"index_topk": 7, "index_head_dim": 16, "index_n_heads": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 8,
    "factor": 64.0,
}


def _config(name: str, **fields) -> PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**fields)


def _kimi_k25() -> PreTrainedConfig:
    text = {**BODY, **LATENT, **EXPERTS, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5, "rope_parameters": YARN}
    vision = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    return _config(
        "Kimi_K25",
        text_config={"model_type": "kimi_k2", **text},
        vision_config={**vision, "pos_emb_height": 4, "pos_emb_width": 4},
        projection_hidden_size=16,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=False,
    )


def _mistral_large4() -> PreTrainedConfig:
    text = {name: value for name, value in LATENT.items() if name != "q_lora_rank"}
    layers = {"num_hidden_layers": 4, "kv_source_layers": [0, 1, 0, 1], "no_rope_layers": [1, 0, 1, 0]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return _config(
        "MistralLarge4",
        text_config={
            **BODY,
            **text,
            **EXPERTS,
            **INDEXER,
            **layers,
            "model_type": "mistral_large4_text",
            "first_k_dense_replace": 1,
            "indexer_types": ["full", "full", "full", "shared"],
        },
        vision_config={"model_type": "pixtral", **vision, "patch_size": 14, "image_size": 28},
    )


def _glm5_next() -> PreTrainedConfig:
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 48}
    return _config(
        "Glm5Next",
        text_config={
            **BODY,
            **LATENT,
            **EXPERTS,
            **INDEXER,
            "model_type": "glm5_next_text",
            "qk_rope_head_dim": 0,
            "index_topk": 6,
            "index_kpool": 2,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "indexer_types": ["full", "full", "shared"],
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "hc_mult": 2,
        },
        vision_config={**vision, "projection_intermediate_size": 16},
        image_token_id=90,
        video_token_id=91,
        image_start_token_id=92,
        image_end_token_id=93,
        video_start_token_id=94,
        video_end_token_id=95,
    )


DENSE: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v2": lambda: _config(
        "DeepseekV2",
        **BODY,
        **LATENT,
        **EXPERTS,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        attention_bias=True,
        rope_parameters=YARN,
    ),
    "deepseek_v2_lite": lambda: _config(
        "DeepseekV2",
        **BODY,
        **(LATENT | {"q_lora_rank": None}),
        **EXPERTS,
        first_k_dense_replace=1,
        rope_parameters=YARN,
    ),
    "deepseek_v3": lambda: _config(
        "DeepseekV3", **BODY, **LATENT, **EXPERTS, first_k_dense_replace=1, attention_bias=True, rope_parameters=YARN
    ),
    "deepseek_v3_neox_rope": lambda: _config(
        "DeepseekV3", **BODY, **LATENT, **EXPERTS, first_k_dense_replace=1, rope_interleave=False
    ),
    "moonlight": lambda: _config(
        "DeepseekV3",
        **BODY,
        **(LATENT | {"q_lora_rank": None}),
        **EXPERTS,
        first_k_dense_replace=1,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    ),
    "kimi_k25": _kimi_k25,
    "kimi_linear": lambda: _config(
        "KimiLinear",
        **BODY,
        **(LATENT | {"q_lora_rank": None}),
        **EXPERTS,
        num_local_experts=8,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        linear_head_dim=8,
        linear_num_heads=2,
    ),
    "glm4_moe_lite": lambda: _config(
        "Glm4MoeLite", **BODY, **(LATENT | {"v_head_dim": 28}), **EXPERTS, mlp_layer_types=["dense", "sparse", "sparse"]
    ),
    "minicpm3": lambda: _config(
        "MiniCPM3", **BODY, **(LATENT | {"v_head_dim": 12}), dim_model_base=16, rope_parameters=LONGROPE
    ),
    "youtu": lambda: _config("Youtu", **BODY, **LATENT),
    "longcat_flash": lambda: _config(
        "LongcatFlash",
        **{name: value for name, value in BODY.items() if name != "num_hidden_layers"},
        **LATENT,
        num_layers=2,
        head_dim=8,
        ffn_hidden_size=56,
        moe_topk=2,
        n_routed_experts=8,
        zero_expert_num=2,
        expert_ffn_hidden_size=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000000.0},
    ),
    "mistral4": lambda: _config(
        "Mistral4",
        **BODY,
        **LATENT,
        **EXPERTS,
        first_k_dense_replace=1,
        rope_parameters=YARN | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1},
    ),
    "axk1": lambda: _config("AXK1", **BODY, **LATENT, **EXPERTS, mlp_layer_types=["dense", "sparse", "sparse"]),
    "bailing_hybrid": lambda: _config(
        "BailingHybrid",
        **BODY,
        **{name: value for name, value in LATENT.items() if name != "q_lora_rank"},
        **EXPERTS,
        num_local_experts=8,
        head_dim=8,
        first_k_dense_replace=1,
        layer_types=["linear_attention", "full_attention", "full_attention"],
    ),
}
"""Models whose every query sees all earlier tokens."""

SPARSE: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v32": lambda: _config("DeepseekV32", **BODY, **LATENT, **EXPERTS, **INDEXER, first_k_dense_replace=1),
    "glm_moe_dsa": lambda: _config(
        "GlmMoeDsa",
        **BODY,
        **(LATENT | {"v_head_dim": 28}),
        **EXPERTS,
        **INDEXER,
        first_k_dense_replace=1,
        indexer_types=["full", "shared", "full"],
    ),
    "axk2": lambda: _config(
        "AXK2",
        **BODY,
        **LATENT,
        **EXPERTS,
        **INDEXER,
        head_dim=20,
        gated_norm_rank=4,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "mistral_large4": _mistral_large4,
    "dots3_note": lambda: _config(
        "Dots3NoteText",
        **BODY,
        **LATENT,
        **EXPERTS,
        **INDEXER,
        sliding_window=6,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=24,
        swa_head_dim=16,
        swa_qk_nope_head_dim=12,
        swa_v_head_dim=10,
    ),
    "glm5_next": _glm5_next,
}
"""Models whose indexer picks the tokens that a query sees."""

SINKS = {
    "hy_v4": lambda: _config(
        "HYV4",
        **BODY,
        **LATENT,
        **EXPERTS,
        **INDEXER,
        mlp_layer_types=["dense", "sparse", "sparse"],
        hc_mult=2,
        head_dim=20,
    ),
}
"""Attention by Transformers' eager function alone, whose softmax is float32."""


def deepseek_v4(**fields) -> PreTrainedConfig:
    """Not MLA: sliding, heavily compressed and sparsely compressed layers over one shared key/value head."""
    body = {name: BODY[name] for name in ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id")}
    shape = {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_attention_heads": 4,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "hc_mult": 2,
        "sliding_window": 8,
        "num_hash_layers": 1,
        "num_hidden_layers": 4,
        "compress_ratios": [0, 128, 4, 4, 0],
    }
    return _config("DeepseekV4", **(body | shape | fields))


def build(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model of the real class in evaluation mode."""
    torch.manual_seed(seed)
    text_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model = (AutoModelForCausalLM if text_only else AutoModelForImageTextToText).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Constructors leave norms at one, biases and gates at zero, where a mistake would not show.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif not parameter.any():
                parameter.normal_(std=0.2)
    model = model.to(dtype).eval()
    model.set_experts_implementation("eager")
    return model
