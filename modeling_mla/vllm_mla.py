"""The plugin by which vLLM knows this library's models: entry point group ``vllm.general_plugins``.

vLLM's Transformers backend runs the modeling files as they are, with its own MLA attention and its paged latent cache
in place of `MLAttention.expand_kv` and the attention function.
"""

from __future__ import annotations

import importlib

import torch
from transformers import PreTrainedConfig

from .attention_mla import layer_window

CACHE_WIDTHS = (320, 512, 576)
"""Values of a token and layer that vLLM's latent cache can hold (0.32, 0.33), on CPUs the last alone."""


def register() -> None:
    """Makes every family known to Transformers' auto classes and to vLLM, in each of vLLM's processes."""
    from vllm import ModelRegistry

    package = importlib.import_module(__package__)
    for name in package.__all__:
        if name.endswith("ForCausalLM"):
            ModelRegistry.register_model(name, f"{__package__}.vllm_models_mla:TransformersForCausalLM")


def why_no_mla_attention(config: PreTrainedConfig) -> str | None:
    """What a model of this library does that vLLM's MLA attention does not, whatever its sizes; None for nothing."""
    if getattr(config, "qk_norm_head_dim", None) is not None:
        return "normalises queries and keys before they are compressed, which vLLM cannot fuse into its MLA attention"
    if config.attention_softcap is not None:
        return f"caps its scores at {config.attention_softcap}, which vLLM's MLA attention ignores"
    if config.attention_sinks:
        return "has attention sinks, which vLLM's MLA attention ignores"
    return None


def refuse_unservable(config: PreTrainedConfig, max_model_len: int, dtype: torch.dtype) -> None:
    """Raises `ValueError`, by name, for what vLLM's MLA attention would ignore or cannot be given."""
    if dtype == torch.float16 and config.latent_norm == "identity":
        raise ValueError(
            "float16 cannot hold the norm that stands for none in this model (its weight is 2**20); serve it with "
            "--dtype bfloat16 or float32."
        )
    reason = why_no_mla_attention(config)
    if reason is not None:
        raise ValueError(f"{config.model_type} {reason}; serve the model with Transformers (transformers serve).")
    if config.q_head_dim is not None:
        raise ValueError(
            f"q_head_dim is {config.q_head_dim}; vLLM cannot fuse queries that are mapped head by head into its MLA "
            "attention; write them as one matrix with: mla export MODEL DIR --to vllm."
        )
    if config.q_lora_rank is not None:
        raise ValueError(
            f"q_lora_rank is {config.q_lora_rank}; vLLM cannot fuse this library's low-rank queries into its MLA "
            "attention; serve the model with Transformers (transformers serve)."
        )
    if hasattr(config, "num_experts_per_tok"):
        raise ValueError(
            f"{config.model_type} has experts, which are stored otherwise than vLLM's backend for Transformers' models "
            "looks for them; serve the model with Transformers (transformers serve)."
        )
    if getattr(config, "logits_scaling", 1) != 1:
        raise ValueError(
            f"logits_scaling is {config.logits_scaling}, which vLLM's backend for Transformers' models does not apply; "
            "serve the model with Transformers (transformers serve)."
        )
    if hasattr(config, "use_parallel_residual"):
        raise ValueError(
            f"{config.model_type} stores its head under a name that vLLM's backend for Transformers' models does not "
            "look for; serve the model with Transformers (transformers serve)."
        )
    if config.rope_long_inv_freq is not None:
        original = config.rope_parameters["original_max_position_embeddings"]
        if max_model_len > original:
            raise ValueError(
                f"beyond {original} tokens this model rotates by other frequencies, of which vLLM would choose one set "
                f"for all sequences of a step; serve at most so many with --max-model-len {original}."
            )
    layers = range(config.num_hidden_layers)
    ranks = sorted({config.layer_kv_lora_rank(layer) for layer in layers})
    widths = sorted({config.layer_qk_rope_head_dim(layer) for layer in layers})
    if len(ranks) > 1 or len(widths) > 1 or config.qk_nope_head_dims is not None:
        raise ValueError(
            f"the layers of this model cache latents of {ranks[0]} to {ranks[-1]} and rotary keys of {widths[0]} to "
            f"{widths[-1]} values, and vLLM wants one size; pad them with: mla export MODEL DIR --to vllm."
        )
    windows = (layer_window(config, layer) for layer in layers)
    window = min((window for window in windows if window is not None), default=max_model_len)
    if window < max_model_len:
        raise ValueError(
            f"the sliding window is {window} tokens, which vLLM's MLA attention ignores; serve at most so many with "
            f"--max-model-len {window}."
        )


def refuse_width(config: PreTrainedConfig) -> None:
    """Raises `ValueError` where no latent cache of vLLM is as wide as this model's."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    if width not in CACHE_WIDTHS:
        raise ValueError(
            f"kv_lora_rank {config.kv_lora_rank} and qk_rope_head_dim {config.qk_rope_head_dim} make a cache of "
            f"{width} values, and vLLM's hold {', '.join(map(str, CACHE_WIDTHS))}; pad them with: mla export MODEL DIR "
            "--to vllm."
        )
