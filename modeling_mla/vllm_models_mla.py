"""vLLM's Transformers backend for this library's models, with the checks that it does not make itself."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from vllm.model_executor.models import transformers as backend

from .attention_mla import layer_window


class TransformersForCausalLM(backend.TransformersForCausalLM):
    """vLLM recognises its backend by this name.

    Raises:
        ValueError: the model would be served without its latent cache, or with other results.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        refuse_unservable(model_config.hf_text_config, model_config.max_model_len)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not model_config.use_mla:
            raise ValueError(
                f"vLLM does not use its MLA attention for {model_config.model}; unset VLLM_MLA_DISABLE, and read "
                "vLLM's log for what it could not fuse."
            )


def refuse_unservable(config: PreTrainedConfig, max_model_len: int) -> None:
    """Raises `ValueError`, by name, for what vLLM's MLA attention would ignore or cannot be given."""
    if hasattr(config, "qk_norm_head_dim"):
        raise ValueError(
            f"{config.model_type} normalises queries and keys of every head before they are compressed, which vLLM "
            "cannot fuse into its MLA attention; serve the model with Transformers (transformers serve)."
        )
    ranks = sorted({config.layer_kv_lora_rank(layer) for layer in range(config.num_hidden_layers)})
    widths = sorted({config.layer_qk_rope_head_dim(layer) for layer in range(config.num_hidden_layers)})
    if len(ranks) > 1 or len(widths) > 1:
        raise ValueError(
            f"the layers of this model cache latents of {ranks[0]} to {ranks[-1]} and rotary keys of {widths[0]} to "
            f"{widths[-1]} values, and vLLM wants one size; pad them with: mla export MODEL DIR --to vllm."
        )
    windows = {layer_window(config, layer) for layer in range(config.num_hidden_layers)} - {None}
    if windows and min(windows) < max_model_len:
        raise ValueError(
            f"the sliding window is {min(windows)} tokens, which vLLM's MLA attention ignores; serve at most that "
            f"with --max-model-len {min(windows)}."
        )
